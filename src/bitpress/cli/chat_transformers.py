"""Answers by transformers, for what the native engine does not run."""

import time
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.conversation import Show
from bitpress.cli.plain import load_plain
from bitpress.cli.request import Asked, threads_text
from bitpress.cli.screen import size
from bitpress.runtime.messages import Prompt
from bitpress.runtime.native.text import Pieces, text_decoder
from bitpress.runtime.opening import OpenedModel
from bitpress.runtime.prompt import check_prompt, choose_sampling, encode_prompt, end_tokens

__all__ = ["Transformers", "speak_compressed", "speak_plain"]


def speak_plain(source: SourceCheckpoint, asked: Asked) -> "Transformers":
    """Load a model that is not compressed."""
    _use_threads(asked)
    model = load_plain(source)
    weights = f"as stored, {str(model.dtype).removeprefix('torch.')}"
    return Transformers(model, load_tokenizer(source.root), asked, reason="the model is not compressed", weights=weights)


def speak_compressed(opened: OpenedModel, asked: Asked, reason: str) -> "Transformers":
    """Load a directory that bitpress wrote; `reason` says why transformers runs it."""
    _use_threads(asked)
    weights: Literal["packed", "decoded"] = "packed" if asked.packed or asked.memory is not None else "decoded"
    model = opened.load_transformers(weights=weights, memory=asked.memory)
    return Transformers(model, load_tokenizer(opened.directory), asked, reason=reason, weights=weights)


def _use_threads(asked: Asked) -> None:
    if asked.engine.threads is not None:
        torch.set_num_threads(asked.engine.threads)


class Transformers:
    """A model of transformers that answers. `weights` says how its weights are held."""

    def __init__(self, model: Any, tokenizer: Any, asked: Asked, *, reason: str, weights: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts: dict[str, Any] = {
            "runtime": "transformers",
            "reason": reason,
            "weights": weights,
            "threads": torch.get_num_threads(),
        }
        if asked.memory is not None:
            self.facts["weight_bytes"] = _held_bytes(self.model)
        self._asked = asked
        own = self.model.generation_config
        self._sampling = choose_sampling(own, asked.temperature, asked.seed, **asked.sampling)
        self._ends = end_tokens(own, self.model.config, self.tokenizer)
        # `generate` adds what the model's own settings have and ours do not say (beams, n-grams, suppressed tokens), some of which it
        # cannot do while text is shown as it is made. Both runtimes follow the same ones: those above.
        self.model.generation_config = GenerationConfig()

    def line(self) -> str:
        held = f", {size(self.facts['weight_bytes'])}" if "weight_bytes" in self.facts else ""
        weights = f"weights {self.facts['weights']}{held}"
        return f"transformers: {self.facts['reason']}; {weights}, {threads_text(self.facts['threads'])}"

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> dict[str, Any]:
        tokens = encode_prompt(self.tokenizer, prompt, raw=raw)
        config = self.model.config
        room = check_prompt(tokens, config, getattr(config.get_text_config(), "max_position_embeddings", None))
        ends = self._ends
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


def _held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and kept buffers, shared memory once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
