"""The native engine: a decoder that runs on packed weights, from a prompt's tokens to the next one in a single call.

    engine = load(DIR, runtime="native").engine
    for token in engine.generate(tokens, max_tokens=64): ...

Products read the codes as they are stored (`kernels.native_layout`) and take their input in 8 bits, rounded anew at every product, or in float
(`activations="none"`), or prompts in float and single tokens in 8 bits ("mixed"). Where the model rounds the input of a product itself, its codes
are multiplied (`kernels.integers`), whatever the option says. Norms, attention and everything between products are computed in float, the cache is kept in 16 or 8 bits.
Nothing here imports torch or transformers: a model that is laid out already (`runtime.native.layout_cache`) runs without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bitpress.errors import CheckpointError, NumericsError, UsageError
from bitpress.library import chosen_path, library
from bitpress.runtime.native.architectures.layout import Layout
from bitpress.runtime.native.architectures.steps import NativeStep
from bitpress.runtime.native.options import MOST_THREADS, EngineOptions
from bitpress.runtime.sampling import Sampling
from bitpress.settings import usable_threads

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

__all__ = ["Bits", "Engine", "Parts", "make_engine", "wanted_context"]

# Nats per token that rounding the inputs of a prompt may cost. A directory whose prompts cost more records it, and they stay float.
MOST_PROMPT_COST = 0.002
# The cache is mapped for the whole context but takes memory only as it fills; the tables of rotations take theirs at once.
USUAL_CONTEXT = 32768


class Engine:
    """A model in native memory and one text. `sequence` starts another text on the same model; several engines can live in one process."""

    def __init__(self, model: Any, config: Any, layout: Layout, facts: dict[str, Any]) -> None:
        self._model = model
        self._sequence = model.sequence()
        self.config = config
        self.layout = layout
        self.facts = facts
        self._cached = np.empty(layout.context, np.int32)  # the first `length` are the tokens in the cache

    def sequence(self) -> Engine:
        """Return an engine for another text on the same model: the weights and threads are shared, the cache is not."""
        return Engine(self._model, self.config, self.layout, self.facts)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._sequence.length)

    @property
    def context(self) -> int:
        return self.layout.context

    @property
    def apart(self) -> float:
        """Return the share of prompts' inputs to products that were multiplied in float, because 8 bits do not hold them."""
        return float(self._model.inputs_apart / max(1, self._model.inputs))

    def reset(self) -> None:
        """Forget the text."""
        self._sequence.truncate(0)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} tokens cannot be cut to a length of {length}.")
        self._sequence.truncate(length)

    def forward(
        self, tokens: Sequence[int] | np.ndarray, logits: Literal["none", "last", "all"] = "last"
    ) -> Float[torch.Tensor, "rows vocabulary"]:
        """Run tokens after those of the cache and return logits in float32: of none of them, of the last, or of all."""
        import torch

        if logits not in ("none", "last", "all"):
            raise UsageError(f"logits={logits!r}: it is 'none', 'last' or 'all'.")
        given = self._checked(tokens)
        self._check_room(given)
        rows = {"none": 0, "last": 1, "all": len(given)}[logits]
        return torch.from_numpy(self._forward(given, rows))

    def read(self, tokens: Sequence[int] | np.ndarray, *, logits: bool = False) -> None:
        """Run tokens after those of the cache to fill the cache; with `logits`, those of the last token are computed too."""
        given = self._checked(tokens)
        self._check_room(given)
        self._forward(given, int(logits))

    def _forward(self, given: np.ndarray, rows: int) -> np.ndarray:
        values = np.empty((rows, self.layout.vocabulary), np.float32)
        self._remember(given)
        with self._range():
            self._model.forward(self._sequence, given, values)
        return values

    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        chunk: int = 512,
    ) -> Iterator[int]:
        """Yield the tokens that continue a text, up to a token of `stop` (which is not yielded) or the end of the context.

        The text so far stays in the cache: the next call runs only the tokens after the beginning that both texts share.
        """
        how = sampling or Sampling()
        built = library()
        try:
            native_how = built.Sampling(how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty)
        except ValueError as error:
            raise UsageError(f"{error}.") from error
        random = built.Random(how.seed & (2**64 - 1))
        given = self._checked(tokens)
        self.truncate(self.common(given))
        fresh = given[self.length :]
        while len(fresh) > chunk:  # signals are handled between chunks
            self._forward(fresh[:chunk], 0)
            fresh = fresh[chunk:]
        for _ in range(min(max_tokens, self.context - len(given))):
            self._remember(fresh)
            with self._range():
                token = int(self._model.step(self._sequence, fresh, native_how, random))
            if token in stop:
                return
            yield token
            fresh = np.array([token], np.int32)

    def common(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Count the first tokens of a text that the cache holds; the last one is left out, since it is run again for its logits."""
        given = np.asarray(tokens)[:-1]
        length = min(self.length, len(given))
        same = self._cached[:length] == given[:length]
        return int(length if same.all() else np.argmin(same))

    @contextmanager
    def _range(self) -> Iterator[None]:
        """Turn the overflow of a native call into a NumericsError that says what to do."""
        try:
            yield
        except OverflowError as error:
            settings = ", ".join(f"{key} {self.facts[key]}" for key in ("activations", "cache") if key in self.facts)
            raise NumericsError(
                f"the native engine ({settings}): {error}; this model needs the runtime transformers (--runtime transformers)."
            ) from error

    def _remember(self, tokens: np.ndarray) -> None:
        """Record tokens that are about to be run after those of the cache."""
        behind = self._cached[self.length : self.length + len(tokens)]
        behind[:] = tokens[: len(behind)]

    def _check_room(self, given: np.ndarray) -> None:
        if len(given) > self.context - self.length:
            raise UsageError(f"{len(given)} tokens after {self.length} in the cache; the context is {self.context}.")

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        given = np.asarray(tokens, dtype=np.int64).reshape(-1)
        if not len(given):
            raise UsageError("there are no tokens to run.")
        unknown = given[(given < 0) | (given >= self.layout.vocabulary)]
        if len(unknown):
            raise UsageError(f"token {int(unknown[0])} is not in the vocabulary of {self.layout.vocabulary}.")
        if len(given) > self.context:
            raise UsageError(f"{len(given)} tokens; the context is {self.context}.")
        return given.astype(np.int32)


@dataclass(frozen=True)
class Bits:
    """Bits per weight: in the file, and as native code reads them."""

    stored: float
    memory: float


@dataclass(frozen=True)
class Parts:
    """A model as the engine takes it: its layout, its layers in native memory, and facts about loading.

    config           the settings about tokens: `vocab_size`, `eos_token_id`, `max_position_embeddings`
    layers           the steps of every layer, with their weights
    embedding, head  one object if they are tied
    bytes_per_token  bytes of all weights that a token is multiplied with
    bits             bits per weight of the linear layers: as stored, and in native memory
    prompt_cost      nats per token that 8-bit inputs cost in prompts; None if the directory records no cost
    inputs           how the model itself rounds inputs of products, and whether those are products of whole numbers
    """

    config: Any
    layout: Layout
    layers: list[list[NativeStep]]
    final_norm: np.ndarray
    embedding: Any
    head: Any
    head_format: str
    expanded: list[str]
    bytes_per_token: int
    bits: Bits
    prompt_cost: float | None = None
    inputs: list[str] = field(default_factory=list)


def wanted_context(layout: Layout, context: int | None) -> int:
    """Return the context to make room for. Raises UsageError for one that the model does not have."""
    wanted = min(layout.context, USUAL_CONTEXT) if context is None else context
    if not 1 <= wanted <= layout.context:
        raise UsageError(f"context={wanted}: the model's own is {layout.context}.")
    return wanted


def make_engine(parts: Parts, options: EngineOptions, *, where: object = "the model", path: str | None = None) -> Engine:
    """Put an engine together; without `path`, on the best code path.

    Raises UsageError, and CheckpointError, which begins with `where`, for parts that do not fit together.
    """
    activations = options.activations
    if activations is None:
        activations = "mixed" if (parts.prompt_cost or 0.0) > MOST_PROMPT_COST else "int8"
    layout, used = parts.layout, options.threads or min(usable_threads(), MOST_THREADS)
    wanted = wanted_context(layout, options.context)
    shape = {
        "hidden": layout.hidden,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "head": layout.head,
        "vocabulary": layout.vocabulary,
        "context": wanted,
        "eps": layout.eps,
        "attention_scale": layout.attention_scale,
        "embedding_scale": layout.embedding_scale,
        "tanh_gelu": layout.tanh_gelu,
        "final_norm": parts.final_norm,
    }
    ropes = [(rotation.frequencies, rotation.factor) for rotation in layout.rotations]
    code_path = path or chosen_path()
    try:
        model = library().Model(
            shape,
            parts.layers,
            ropes,
            parts.embedding,
            parts.head,
            threads=used,
            byte_activations=activations != "none",
            float_prompts=activations == "mixed",
            cache=options.cache_type,
            path=code_path,
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}.") from error
    facts = {
        "runtime": "native",
        "path": model.path,
        "threads": used,
        "activations": activations,
        "prompt_cost": parts.prompt_cost,
        "inputs": parts.inputs,
        "cache": options.cache_type,
        "head": parts.head_format,
        "expanded": parts.expanded,
        "bytes_per_token": parts.bytes_per_token,
        "bits_stored": parts.bits.stored,
        "bits_in_memory": parts.bits.memory,
        "cache_bytes_per_position": model.cache_bytes_per_position,
    }
    return Engine(model, parts.config, replace(layout, context=wanted), facts)
