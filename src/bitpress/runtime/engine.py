"""The native engine: a decoder that runs on packed weights, from a prompt's tokens to the next one in a single call.

    engine = load(DIR, runtime="native")
    for token in engine.generate(tokens, max_tokens=64): ...

Products read the codes as they are stored (`kernels.strips`) and take their input in 8 bits, rounded anew at every product, or in float
(`activations="none"`). Norms, attention and everything between products are computed in float, the cache is kept in 16 or 8 bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from bitpress import native
from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import CheckpointError, FormatError, KernelUnavailable, UsageError
from bitpress.formats import CompressedWeight
from bitpress.formats.packed import Packed
from bitpress.formats.table import parse_format
from bitpress.kernels.strips import Strips, lay_out, lay_out_matrix
from bitpress.runtime.families import Layout, describe, refusal
from bitpress.runtime.skeleton import build_config
from bitpress.settings import usable_cores

__all__ = ["Engine", "Sampling", "load_engine", "refuses"]

Activations = Literal["int8", "none"]
CACHES = {"fp16": False, "int8": True}
# Rows of a head that are rounded at a time.
ROUNDED_TOGETHER = 4096
# The cache is mapped for the whole context but takes memory only as it fills; the tables of rotations take theirs at once.
USUAL_CONTEXT = 32768
MOST_THREADS = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the repetition penalty first, then temperature, top-k, top-p and min-p in turn.

    temperature         0 takes the most likely token
    top_k               keep the k most likely; 0 keeps all
    top_p               keep the fewest that have this probability together
    min_p               keep those at least this part as likely as the most likely
    repetition_penalty  divide (multiply, if negative) the logit of every token that has been before
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Engine:
    """A model in native memory with its cache. One engine serves one text at a time; several can live in one process."""

    def __init__(self, model: Any, config: Any, layout: Layout, facts: dict[str, Any]) -> None:
        self._model = model
        self.config = config
        self.layout = layout
        self.facts = facts
        self._cached = np.empty(layout.context, np.int32)  # the first `length` are the tokens in the cache

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._model.length)

    @property
    def context(self) -> int:
        return self.layout.context

    def reset(self) -> None:
        """Forget the text."""
        self._model.truncate(0)

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} tokens cannot be cut to a length of {length}.")
        self._model.truncate(length)

    def forward(
        self, tokens: Sequence[int] | np.ndarray, logits: Literal["none", "last", "all"] = "last"
    ) -> Float[torch.Tensor, "rows vocabulary"]:
        """Run tokens behind those of the cache and give logits in float32: of none of them, the last, or all."""
        if logits not in ("none", "last", "all"):
            raise UsageError(f"logits={logits!r}: it is 'none', 'last' or 'all'.")
        given = self._checked(tokens)
        if len(given) > self.context - self.length:
            raise UsageError(f"{len(given)} tokens behind {self.length} of the cache; the context is {self.context}.")
        rows = {"none": 0, "last": 1, "all": len(given)}[logits]
        values = np.empty((rows, self.layout.vocabulary), np.float32)
        self._remember(given)
        self._model.forward(given, values)
        return torch.from_numpy(values)

    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        chunk: int = 512,
    ) -> Iterator[int]:
        """Give token after token behind a text, up to a token of `stop` (which is not given) or the end of the context.

        The text so far is kept in the cache: the next call begins behind what the two texts have in common.
        """
        how = sampling or Sampling()
        library = native.library()
        try:
            native_how = library.Sampling(how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty)
        except ValueError as error:
            raise UsageError(f"{error}.") from error
        random = library.Random(how.seed & (2**64 - 1))
        given = self._checked(tokens)
        self.truncate(self.common(given))
        fresh = given[self.length :]
        while len(fresh) > chunk:  # a signal is seen between chunks
            self.forward(fresh[:chunk], "none")
            fresh = fresh[chunk:]
        for _ in range(min(max_tokens, self.context - len(given))):
            self._remember(fresh)
            token = int(self._model.step(fresh, native_how, random))
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

    def _remember(self, tokens: np.ndarray) -> None:
        """Note tokens that are about to be run behind those of the cache."""
        behind = self._cached[self.length : self.length + len(tokens)]
        behind[:] = tokens[: len(behind)]

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


def refuses(config: Any) -> str | None:
    """Say why the native engine cannot run a model of this configuration here, or None."""
    try:
        native.library()
    except KernelUnavailable as error:
        return str(error)
    return refusal(config)


def load_engine(
    directory: str | Path,
    *,
    activations: Activations = "int8",
    cache: Literal["fp16", "int8"] = "fp16",
    head: str = "int8-g64",
    context: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load a directory that bitpress wrote into the native engine.

    activations  "int8": inputs of products are rounded to 8 bits, a scale for every group; "none": they stay float
    cache        type of the kept keys and values
    head         format to round an uncompressed output head to ("keep": its 16 bits); a tied embedding follows it
    context      tokens that there must be room for; the model's own limit, or 32,768, where not given
    threads      as many as the process may use, where not given

    Raises KernelUnavailable for an architecture that the engine does not know, CheckpointError as `load` does.
    """
    if activations not in ("int8", "none"):
        raise UsageError(f"activations={activations!r}: it is 'int8' or 'none'.")
    if cache not in CACHES:
        raise UsageError(f"cache={cache!r}: it is 'fp16' or 'int8'.")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads={threads}: it is 1 to {MOST_THREADS}.")
    pressed = PressedCheckpoint.open(directory, verify=verify)
    config = build_config(pressed.config)
    reason = refuses(config)
    if reason is not None:
        raise KernelUnavailable(f"the native engine does not run {directory}: {reason}; use the runtime transformers.")
    layout = describe(config)
    wanted = min(layout.context, USUAL_CONTEXT) if context is None else context
    if not 1 <= wanted <= layout.context:
        raise UsageError(f"context={wanted}: the model's own is {layout.context}.")
    reader = _Reader(pressed, note)
    used = threads or usable_cores()
    library = native.library()
    path = native.chosen_path()
    made = _assemble(reader, layout, head)
    shape = {
        "hidden": layout.hidden,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "head": layout.head,
        "intermediate": layout.intermediate,
        "vocabulary": layout.vocabulary,
        "context": wanted,
        "eps": layout.eps,
        "attention_scale": layout.attention_scale,
        "embedding_scale": layout.embedding_scale,
        "tanh_gelu": layout.tanh_gelu,
        "final_norm": reader.norm("model.norm.weight", layout),
    }
    ropes = [(rotation.frequencies.numpy(), rotation.factor) for rotation in layout.rotations]
    try:
        model = library.Model(
            shape,
            made.layers,
            ropes,
            made.embedding.linear,
            made.head.linear,
            used,
            activations == "int8",
            CACHES[cache],
            path,
        )
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}.") from error
    weights = {id(s): s.nbytes for s in (*made.linears, made.head)}
    facts = {
        "runtime": "native",
        "path": model.path,
        "threads": used,
        "activations": activations,
        "cache": cache,
        "head": made.head_format,
        "expanded": sorted(set(reader.expanded)),
        "bytes_per_token": sum(weights.values()),
        "cache_bytes_per_position": model.cache_bytes_per_position,
    }
    return Engine(model, config, replace(layout, context=wanted), facts)


@dataclass(frozen=True)
class _Assembled:
    layers: list[dict[str, Any]]
    linears: list[Strips]
    embedding: Strips
    head: Strips
    head_format: str


class _Reader:
    """Reads parameters by name and lays linear layers out; remembers what had to be expanded."""

    def __init__(self, pressed: PressedCheckpoint, note: Callable[[str], None]) -> None:
        self.pressed = pressed
        self.note = note
        self.expanded: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.pressed.plain or name in self.pressed.manifest.weights

    def plain(self, name: str) -> torch.Tensor:
        if name not in self.pressed.plain:
            raise CheckpointError(f"{self.pressed.root}: lacks {name!r}.")
        return read_tensor(*self.pressed.tensors[name])

    def norm(self, name: str, layout: Layout) -> np.ndarray:
        weight = self.plain(name).float()
        return (weight + 1.0 if layout.family.one_plus else weight).contiguous().numpy()

    def weight(self, name: str) -> CompressedWeight | torch.Tensor:
        return self.pressed.read_weight(name) if name in self.pressed.manifest.weights else self.plain(name)

    def linear(self, stem: str) -> Strips:
        weight = self.weight(f"{stem}.weight")
        bias = self.plain(f"{stem}.bias") if self.has(f"{stem}.bias") else None
        return self.strips(stem, weight, bias)

    def strips(self, stem: str, weight: CompressedWeight | torch.Tensor, bias: torch.Tensor | None = None) -> Strips:
        try:
            made = lay_out(weight, bias) if isinstance(weight, CompressedWeight) else lay_out_matrix(weight, bias)
        except FormatError as error:
            raise CheckpointError(f"{self.pressed.root}: {stem}: {error}") from error
        self.expanded += made.expanded
        self.note(stem)
        return made


def _assemble(reader: _Reader, layout: Layout, head: str) -> _Assembled:
    layers: list[dict[str, Any]] = []
    linears: list[Strips] = []
    family = layout.family
    for index in range(layout.layers):
        stem = f"model.layers.{index}"
        named = {
            **{part: reader.linear(f"{stem}.self_attn.{part}_proj") for part in ("q", "k", "v", "o")},
            **{part: reader.linear(f"{stem}.mlp.{part}_proj") for part in ("gate", "up", "down")},
        }
        linears += named.values()
        behind = "post_attention_layernorm"
        mlp_norm = "pre_feedforward_layernorm" if family.out_norms else behind

        def norm(name: str, wanted: bool = True, stem: str = stem) -> np.ndarray | None:
            return reader.norm(f"{stem}.{name}.weight", layout) if wanted else None

        layers.append(
            {
                **{part: made.linear for part, made in named.items()},
                "input_norm": norm("input_layernorm"),
                "mlp_norm": norm(mlp_norm),
                "attention_out_norm": norm(behind, family.out_norms),
                "mlp_out_norm": norm("post_feedforward_layernorm", family.out_norms),
                "q_norm": norm("self_attn.q_norm", family.head_norms),
                "k_norm": norm("self_attn.k_norm", family.head_norms),
                "rope": layout.rope[index],
                "window": layout.window[index],
            }
        )
    table = reader.weight("model.embed_tokens.weight")
    top = table if layout.tied else reader.weight("lm_head.weight")
    head_format = head
    if isinstance(top, CompressedWeight):
        head_format = "as stored"
    elif head == "keep":
        head_format = str(top.dtype).removeprefix("torch.")
    else:
        rounded = _rounded(top, head)
        top, head_format = CompressedWeight((rounded,)), rounded.format.name
    made_head = reader.strips("head", top)
    embedding = made_head if layout.tied else reader.strips("embedding", table)
    return _Assembled(layers, linears, embedding, made_head, head_format)


def _rounded(w: torch.Tensor, name: str) -> Packed:
    fmt = parse_format(name)
    try:
        fmt.block_grid((w.shape[0], w.shape[1]))
    except FormatError:
        if name != "int8-g64":
            raise
        fmt = parse_format("int8-row")
    # Some rows at a time: the head is a model's largest matrix, and only its codes are to stay.
    equal = next((n for n in range(ROUNDED_TOGETHER, ROUNDED_TOGETHER // 16, -1) if w.shape[0] % n == 0), w.shape[0])
    pieces = w.split(equal) if fmt.rows_apart else (w,)
    packed = []
    for piece in pieces:
        params = fmt.fit(piece.float())
        packed.append(Packed.pack(fmt, fmt.encode(piece.float(), params), params))
    return Packed.stack_rows(packed)
