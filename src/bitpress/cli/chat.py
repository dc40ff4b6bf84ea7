"""Answers on the terminal: one prompt, or a chat, by the native engine or by transformers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bitpress.cli.screen import err
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.choice import choose_runtime, load_native
from bitpress.runtime.engine import USUAL_HEAD
from bitpress.runtime.messages import Prompt
from bitpress.runtime.prepared import is_prepared
from bitpress.runtime.prompt import choose_sampling
from bitpress.runtime.text import Pieces, TextEngine
from bitpress.settings import layout_directory

__all__ = ["Asked", "Show", "answer_once", "chat", "threads_text"]

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
    memory: str | None = None
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
    head = asked.native.get("head", USUAL_HEAD)
    known = is_prepared(directory, head)
    if not known:
        from bitpress.checkpoints.pressed import PressedCheckpoint
        from bitpress.formats import parse_format

        if head != "keep":
            parse_format(head)
        PressedCheckpoint.open(directory, verify=False)
    native_options = tuple(f"--{name}" for name in asked.native)
    transformers_options = ("--packed",) * asked.packed + ("--memory",) * (asked.memory is not None)
    choice = choose_runtime(directory, asked.runtime, native=native_options, transformers=transformers_options, head=head)
    speaker: Speaker
    if choice.runtime == "native":
        speaker = _Native(load_native(directory, threads=asked.threads, **asked.native), asked)
    else:
        from bitpress.cli.chat_transformers import Transformers

        speaker = Transformers(directory, asked, choice.reason)
    err.print(speaker.line(), style="dim", markup=False, soft_wrap=True)
    if not known and is_prepared(directory, head):
        text = f"laid out for the next start in {layout_directory()}; BITPRESS_LAYOUTS=off keeps nothing"
        err.print(text, style="dim", markup=False, soft_wrap=True)
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
        parts = [f"native ({f['path']})", threads_text(f["threads"]), activations, *cache, f"head {f['head']}", *expanded]
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


def threads_text(count: int) -> str:
    """Say how many threads there are."""
    return f"{count} thread{'s' * (count != 1)}"
