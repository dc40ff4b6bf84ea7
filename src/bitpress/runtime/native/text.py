"""Text from the native engine, piece by piece while it is generated, up to a stop string.

engine = bitpress.load(DIR, runtime="native")
for piece in engine.stream("Why is the sky blue?"):
    print(piece, end="", flush=True)
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitpress.errors import UsageError
from bitpress.runtime.detokenizer import Detokenizer, text_decoder
from bitpress.runtime.messages import Prompt
from bitpress.runtime.native.engine import Engine
from bitpress.runtime.prompt import check_prompt, encode_prompt, end_tokens
from bitpress.runtime.sampling import Sampling, SamplingRequest

__all__ = ["Completion", "TextEngine", "TextStream"]

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Completion:
    """An answer. `finish` is "stop" at an end token or a stop string, "length" at `max_tokens`, "context" when the context is full.

    prefill_tokens_per_second counts the prompt's tokens that the cache did not hold yet, up to the first token of the answer;
    tokens_per_second counts the tokens after it.
    """

    text: str
    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    prefill_tokens_per_second: float
    finish: Finish
    token_ids: tuple[int, ...]


class TextStream:
    """Pieces of text while they are generated; `result` is the whole answer after the last piece."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        detokenizer: Detokenizer,
        max_tokens: int,
        sampling: Sampling,
        ends: Sequence[int],
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._detokenizer = detokenizer
        self._max_tokens = max_tokens
        self._tokens = engine.generate(prompt, max_tokens=max_tokens, sampling=sampling, stop=ends)
        self._run = self._make()
        self._result: Completion | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._run)

    @property
    def result(self) -> Completion:
        if self._result is None:
            raise UsageError("the text has not ended; read the stream to its end first.")
        return self._result

    def _make(self) -> Iterator[str]:
        tokens: list[int] = []
        text: list[str] = []
        seconds = [0.0, 0.0]  # up to the first token, and after it
        fresh = len(self._prompt) - self._engine.common(self._prompt)
        while not self._detokenizer.stopped:
            start = time.perf_counter()
            token = next(self._tokens, None)
            seconds[len(tokens) > 0] += time.perf_counter() - start
            if token is None:
                break
            tokens.append(token)
            piece = self._detokenizer.add(token)
            text.append(piece)
            if piece:
                yield piece
        rest = self._detokenizer.end()
        text.append(rest)
        full = len(self._prompt) + len(tokens) >= self._engine.context
        finish: Finish = "stop"
        if not self._detokenizer.stopped and (full or len(tokens) >= self._max_tokens):
            finish = "length" if len(tokens) >= self._max_tokens else "context"
        steps = len(tokens) - 1 if finish != "stop" or self._detokenizer.stopped else len(tokens)
        self._result = Completion(
            text="".join(text),
            tokens=len(tokens),
            prompt_tokens=len(self._prompt),
            tokens_per_second=steps / seconds[1] if steps > 0 else 0.0,
            prefill_tokens_per_second=fresh / seconds[0] if seconds[0] else 0.0,
            finish=finish,
            token_ids=tuple(tokens),
        )
        if rest:
            yield rest


class TextEngine:
    """The native engine with its model's tokenizer and settings: text in, text out. `engine` itself takes tokens."""

    def __init__(self, engine: Engine, tokenizer: Callable[[], Any], generation: Any = None, file_bytes: int = 0) -> None:
        """Take an engine, a function that loads its tokenizer when it is first needed, and the model's generation settings."""
        self.engine = engine
        self.file_bytes = file_bytes
        self.generation = generation
        self._make_tokenizer = tokenizer

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self._make_tokenizer()

    @property
    def facts(self) -> dict[str, Any]:
        """Return the settings in use: code path, threads, types, and the formats that were expanded to 16 bits."""
        return self.engine.facts

    def encode(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the tokens of a text or of messages, by the model's chat template if it has one, unless `raw`."""
        return encode_prompt(self.tokenizer, prompt, raw=raw, tools=tools)

    def sampling(self, temperature: float = 0.0, seed: int = 0, **settings: Any) -> Sampling:
        """Return the model's own sampling settings at a temperature, each replaced by the one in `settings`: see SamplingRequest."""
        return SamplingRequest(temperature, seed, **settings).resolve(self.generation)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> TextStream:
        """Answer piece by piece.

        prompt      a text, or messages as chat templates take them: `role` and `content`, which is a text, a list of parts
                    {"type": "text", "text": ...} or None, and tool calls; the beginning that it shares with the last prompt is not run again
        max_tokens  tokens to generate at most; 1 or more
        stop        strings that end the answer and are not part of it
        raw         continue the text as it is, without the chat template
        tools       JSON schemas of functions, for templates that support them

        Raises UsageError for a prompt that is empty, has no room in the context or does not suit the template, CheckpointError for a template that fails.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens={max_tokens}: it must be 1 or more.")
        tokens = self.encode(prompt, raw=raw, tools=tools)
        check_prompt(tokens, self.engine.config, self.engine.context)
        ends = end_tokens(self.generation, self.engine.config, self.tokenizer)
        detokenizer = Detokenizer(text_decoder(self.tokenizer), stop)
        return TextStream(self.engine, tokens, detokenizer, max_tokens, sampling or Sampling(), ends)

    def complete(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Return the whole answer; the arguments are those of `stream`."""
        answer = self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw, tools=tools)
        for _ in answer:
            pass
        return answer.result
