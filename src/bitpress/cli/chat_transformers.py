"""Answers by transformers, for models that the native engine does not run."""

import time
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.conversation import Show
from bitpress.cli.plain import load_plain
from bitpress.cli.request import Answer, Request, threads_text
from bitpress.cli.screen import size
from bitpress.runtime.detokenizer import Detokenizer, text_decoder
from bitpress.runtime.messages import Prompt
from bitpress.runtime.opening import OpenedModel
from bitpress.runtime.prompt import check_prompt, encode_prompt, end_tokens

__all__ = ["Transformers", "speak_compressed", "speak_plain"]


def speak_plain(source: SourceCheckpoint, request: Request) -> "Transformers":
    """Load a model that is not compressed."""
    _use_threads(request)
    model = load_plain(source)
    weights = f"as stored, {str(model.dtype).removeprefix('torch.')}"
    return Transformers(model, load_tokenizer(source.root), request, reason="the model is not compressed", weights=weights)


def speak_compressed(opened: OpenedModel, request: Request, reason: str) -> "Transformers":
    """Load a directory that bitpress wrote; `reason` says why transformers runs it."""
    _use_threads(request)
    weights: Literal["packed", "decoded"] = "packed" if request.packed or request.memory is not None else "decoded"
    model = opened.load_transformers(weights=weights, memory=request.memory)
    return Transformers(model, load_tokenizer(opened.directory), request, reason=reason, weights=weights)


def _use_threads(request: Request) -> None:
    if request.engine.threads is not None:
        torch.set_num_threads(request.engine.threads)


class Transformers:
    """A model of transformers that answers. `weights` says how its weights are held."""

    def __init__(self, model: Any, tokenizer: Any, request: Request, *, reason: str, weights: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts: dict[str, Any] = {
            "runtime": "transformers",
            "reason": reason,
            "weights": weights,
            "threads": torch.get_num_threads(),
        }
        if request.memory is not None:
            self.facts["weight_bytes"] = _held_bytes(self.model)
        self._request = request
        own = self.model.generation_config
        self._sampling = request.sampling.resolve(own)
        self._ends = end_tokens(own, self.model.config, self.tokenizer)
        # `generate` would add settings of the model's own that we do not have (beams, n-grams, suppressed tokens), some of which do not
        # work while text is shown as it is generated. Both runtimes follow the same settings, those above.
        self.model.generation_config = GenerationConfig()

    def line(self) -> str:
        held = f", {size(self.facts['weight_bytes'])}" if "weight_bytes" in self.facts else ""
        weights = f"weights {self.facts['weights']}{held}"
        return f"transformers: {self.facts['reason']}; {weights}, {threads_text(self.facts['threads'])}"

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> Answer:
        tokens = encode_prompt(self.tokenizer, prompt, raw=raw)
        config = self.model.config
        room = check_prompt(tokens, config, getattr(config.get_text_config(), "max_position_embeddings", None))
        ends = self._ends
        streamer = _Streamer(Detokenizer(text_decoder(self.tokenizer), self._request.stop), ends, show)
        ids = torch.tensor([tokens])
        torch.manual_seed(self._sampling.seed)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(ends, min(self._request.max_tokens, room)),
                streamer=streamer,
                stopping_criteria=[streamer.has_stopped],
            )
        seconds = time.perf_counter() - start
        return Answer(
            text="".join(streamer.text),
            tokens=streamer.count,
            prompt_tokens=len(tokens),
            tokens_per_second=streamer.count / seconds,
            finish="stop" if streamer.ended else "length" if streamer.count >= self._request.max_tokens else "context",
        )

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
        # All of them are set: for others transformers uses its own defaults, such as a top_k of 50.
        sampling = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p}
        return GenerationConfig(**settings, **sampling, do_sample=True)


def _held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers; shared memory counts once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Streamer:
    """Takes tokens from transformers' `generate` one by one, and stops it when a stop string has appeared."""

    def __init__(self, detokenizer: Detokenizer, ends: tuple[int, ...], show: Show) -> None:
        self.text: list[str] = []
        self.count = 0
        self.ended = False
        self._detokenizer, self._ends, self._show = detokenizer, ends, show
        self._seen_prompt = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in tokens.reshape(-1).tolist():
            if token in self._ends or self._detokenizer.stopped:
                self.ended = True
                return
            self.count += 1
            self._say(self._detokenizer.add(token))
            self.ended = self._detokenizer.stopped

    def end(self) -> None:
        self._say(self._detokenizer.end())
        self.ended = self.ended or self._detokenizer.stopped

    def has_stopped(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((tokens.shape[0],), self._detokenizer.stopped)

    def _say(self, piece: str) -> None:
        self.text.append(piece)
        self._show(piece)
