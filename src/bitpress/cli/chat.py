"""Answers on the terminal: one prompt, or a chat, by the native engine or by transformers."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.screen import err
from bitpress.errors import CheckpointError, UsageError
from bitpress.formats import parse_format
from bitpress.runtime.choice import choose_runtime, load_native
from bitpress.runtime.loading import load
from bitpress.runtime.prompt import Prompt, check_prompt, choose_sampling, encode_prompt, end_tokens
from bitpress.runtime.text import Pieces, TextEngine, text_decoder

__all__ = ["Asked", "answer_once", "chat"]

Show = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the options of `bitpress run` say. `native` holds those that only the native engine has."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    sampling: dict[str, float | None] = field(default_factory=dict)
    runtime: str = "auto"
    packed: bool = False
    threads: int | None = None
    native: dict[str, Any] = field(default_factory=dict)


class Speaker(Protocol):
    """A model that answers. `facts` says what runs, and `answer` gives the text and its figures."""

    tokenizer: Any
    facts: dict[str, Any]

    def line(self) -> str: ...

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> dict[str, Any]: ...


def answer_once(directory: Path, prompt: str, asked: Asked, *, raw: bool = False, stream: bool = True) -> dict[str, Any]:
    """Answer one prompt; the text goes to standard output while it is made when `stream` is set."""
    if not prompt:
        raise UsageError("the prompt is empty.")
    speaker = _open(directory, asked)
    with _Printed(stream) as printed:
        answer = speaker.answer(prompt, printed.show, raw=raw)
    return {**answer, **speaker.facts}


def chat(directory: Path, asked: Asked) -> None:
    """Talk until an empty line, end of input or Ctrl-C."""
    speaker = _open(directory, asked)
    if speaker.tokenizer.chat_template is None:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template; use --prompt with --raw.")
    err.print("[dim]An empty line ends the chat.[/dim]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        with _Printed(True) as printed:
            answer = speaker.answer(messages, printed.show)
        messages.append({"role": "assistant", "content": answer["text"]})


class _Printed:
    """Prints pieces of text as they come, and ends their line however they end."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._open = False

    def show(self, piece: str) -> None:
        if self._wanted and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._open = True

    def __enter__(self) -> "_Printed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wanted and (self._open or kind is None):
            sys.stdout.write("\n")
            sys.stdout.flush()


def _open(directory: Path, asked: Asked) -> Speaker:
    """Load the model in the runtime that fits, and say which one and why. What is wrong is said before anything slow happens."""
    Pieces(str, asked.stop)
    choose_sampling(None, asked.temperature, asked.seed, **asked.sampling)
    if asked.native.get("head", "keep") != "keep":
        parse_format(asked.native["head"])
    native_options = tuple(f"--{name}" for name in asked.native)
    PressedCheckpoint.open(directory, verify=False)
    choice = choose_runtime(directory, asked.runtime, native=native_options, transformers=("--packed",) if asked.packed else ())
    speaker: Speaker
    if choice.runtime == "native":
        speaker = _Native(load_native(directory, threads=asked.threads, **asked.native), asked)
    else:
        speaker = _Transformers(directory, asked, choice.reason)
    err.print(speaker.line(), style="dim", markup=False, soft_wrap=True)
    return speaker


class _Native:
    def __init__(self, engine: TextEngine, asked: Asked) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.facts = engine.facts
        self._asked = asked
        self._sampling = engine.sampling(asked.temperature, asked.seed, **asked.sampling)

    def line(self) -> str:
        f = self.facts
        activations = "8-bit activations" if f["activations"] == "int8" else "float activations"
        cache = ["8-bit cache"] if f["cache"] == "int8" else []
        expanded = [f"expanded to 16 bits: {', '.join(f['expanded'])}"] if f["expanded"] else []
        parts = [f"native ({f['path']})", _threads(f["threads"]), activations, *cache, f"head {f['head']}", *expanded]
        return ", ".join(parts)

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> dict[str, Any]:
        asked = self._asked
        stream = self.engine.stream(prompt, max_tokens=asked.max_tokens, sampling=self._sampling, stop=asked.stop, raw=raw)
        for piece in stream:
            show(piece)
        made = stream.result
        return {
            "text": made.text,
            "tokens": made.tokens,
            "prompt_tokens": made.prompt_tokens,
            "tokens_per_second": made.tokens_per_second,
            "prefill_tokens_per_second": made.prefill_tokens_per_second,
            "finish": made.finish,
        }


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


class _Transformers:
    def __init__(self, directory: Path, asked: Asked, reason: str) -> None:
        if asked.threads is not None:
            torch.set_num_threads(asked.threads)
        self.model = load(directory, weights="packed" if asked.packed else "decoded")
        self.tokenizer = load_tokenizer(directory)
        self.facts: dict[str, Any] = {
            "runtime": "transformers",
            "reason": reason,
            "weights": "packed" if asked.packed else "decoded",
            "threads": torch.get_num_threads(),
        }
        self._asked = asked
        self._sampling = choose_sampling(self.model.generation_config, asked.temperature, asked.seed, **asked.sampling)

    def line(self) -> str:
        return f"transformers: {self.facts['reason']}; weights {self.facts['weights']}, {_threads(self.facts['threads'])}"

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> dict[str, Any]:
        tokens = encode_prompt(self.tokenizer, prompt, raw=raw)
        config = self.model.config
        room = check_prompt(tokens, config, getattr(config.get_text_config(), "max_position_embeddings", None))
        ends = end_tokens(self.model.generation_config, config, self.tokenizer)
        heard = _Heard(Pieces(text_decoder(self.tokenizer), self._asked.stop), ends, show)
        ids = torch.tensor([tokens])
        torch.manual_seed(self._sampling.seed)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(ends, min(self._asked.max_tokens, room)),
                streamer=heard,
                stopping_criteria=[heard.has_stopped],
            )
        seconds = time.perf_counter() - start
        return {
            "text": "".join(heard.text),
            "tokens": heard.count,
            "prompt_tokens": len(tokens),
            "tokens_per_second": heard.count / seconds,
            "finish": "stop" if heard.ended else "length" if heard.count >= self._asked.max_tokens else "context",
        }

    def _settings(self, ends: tuple[int, ...], max_tokens: int) -> Any:
        from transformers import GenerationConfig

        pad, how = self.tokenizer.pad_token_id, self._sampling
        settings: dict[str, Any] = {
            "eos_token_id": list(ends) or None,
            "pad_token_id": pad if pad is not None else next(iter(ends), None),
            "max_new_tokens": max_tokens,
            "repetition_penalty": how.repetition_penalty,
        }
        if how.temperature == 0:
            return GenerationConfig(**settings, do_sample=False)
        # Every one of them is set: transformers takes what is not from its own defaults, such as a top_k of 50.
        sampling = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p}
        return GenerationConfig(**settings, **sampling, do_sample=True)


class _Heard:
    """Takes tokens from transformers' `generate` one by one, and tells it when a stop string has appeared."""

    def __init__(self, pieces: Pieces, ends: tuple[int, ...], show: Show) -> None:
        self.text: list[str] = []
        self.count = 0
        self.ended = False
        self._pieces, self._ends, self._show = pieces, ends, show
        self._seen_prompt = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in tokens.reshape(-1).tolist():
            if token in self._ends or self._pieces.stopped:
                self.ended = True
                return
            self.count += 1
            self._say(self._pieces.add(token))
            self.ended = self._pieces.stopped

    def end(self) -> None:
        self._say(self._pieces.end())
        self.ended = self.ended or self._pieces.stopped

    def has_stopped(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((tokens.shape[0],), self._pieces.stopped)

    def _say(self, piece: str) -> None:
        self.text.append(piece)
        self._show(piece)
