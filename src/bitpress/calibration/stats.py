"""The statistics of one layer's input, in float32. Only statistics that a method needs are collected.

    gram            [in, in]            x.T @ x / tokens
    mean_abs        [in]                mean of |x| over tokens
    max_abs         [in]                the largest |x| of all tokens
    sample          [sample, in]        x of some tokens, drawn from all: 256 at most, and about half of that at least if there are as many
    cross           [in, in]            (x_original - x).T @ x / tokens; x_original is the same input in the uncompressed model
    attention_gram  [in, in]            the gram of tokens weighted by the attention they are paid, the weights of mean 1
    row_gram        [heads, row, row]   how errors of a head's output rows multiply in the rest of the attention
    head_gram       [heads, in, in]     the gram of the inputs as each head's attention mixes them; for value weights
    loss_gram       [in, in]            the gram of tokens weighted by the loss's squared gradient by what is made of them, weights of mean 1
    sensitivity     [out, in]           mean over texts of the squared gradient of the loss
    output_gram     [out, out]          the gram of the loss's gradients by a token's outputs, tokens weighted by the squared norm of their
                                        input; its diagonal of mean 1

Products of bf16 values are exact in float32 and are added up in float32, a batch of at most a few thousand tokens at a time.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.arithmetic import has_fast_bf16
from bitpress.calibration.held_out import HeldOut, hold_out, join_held_out
from bitpress.devices import CPU
from bitpress.errors import CalibrationError, NumericsError
from bitpress.finite import all_finite
from bitpress.formats import Chain, Map, Permutation, Scale

__all__ = [
    "STATISTICS",
    "Origin",
    "Statistic",
    "Stats",
    "StatsCollector",
    "WeightedGram",
    "add_gram_",
    "mirrored",
    "of_origin",
    "products_of",
]

Origin = Literal["input", "original", "attention", "loss"]
WeightedGram = Literal["attention_gram", "loss_gram"]


@dataclass(frozen=True)
class Statistic:
    """One kind of statistic.

    shape    sizes by name
    origin   its source. "input": the layer's input; "original": that and the same input in the uncompressed model;
             "attention": the block's attention; "loss": the gradient of the whole model's loss
    """

    shape: tuple[str, ...]
    origin: Origin


STATISTICS: dict[str, Statistic] = {
    "gram": Statistic(("in", "in"), "input"),
    "mean_abs": Statistic(("in",), "input"),
    "max_abs": Statistic(("in",), "input"),
    "sample": Statistic(("sample", "in"), "input"),
    "cross": Statistic(("in", "in"), "original"),
    "attention_gram": Statistic(("in", "in"), "attention"),
    "row_gram": Statistic(("heads", "row", "row"), "attention"),
    "head_gram": Statistic(("heads", "in", "in"), "attention"),
    "loss_gram": Statistic(("in", "in"), "loss"),
    "sensitivity": Statistic(("out", "in"), "loss"),
    "output_gram": Statistic(("out", "out"), "loss"),
}


def of_origin(needs: Collection[str], origin: Origin) -> frozenset[str]:
    """Return the named statistics whose source is `origin`."""
    return frozenset(name for name in needs if STATISTICS[name].origin == origin)


# Tokens that a sample holds at most.
SAMPLE = 256
# Multiples of 2^32 / golden ratio spread evenly over 32 bits whatever their number, so tokens that are drawn by them follow no period of the
# text: one of every so many would all stand at the beginnings of windows.
_SPREAD = 2654435769

# Tokens whose magnitudes are added up at a time.
TOKENS_TOGETHER = 256
# The gram is built from square tiles of its upper triangle, which saves a third of the products at 3 tiles and near half at many.
# Smaller tiles would leave too little work per product.
TILE = 192


@dataclass(frozen=True)
class Stats:
    """Statistics of one layer; `rescaled` gives those of the same layer after a scaling of its input's channels.

    `held_out` are inputs that no statistic counts; errors are measured on them, by the layer's own input and weight.
    """

    tokens: int
    gram: Float[torch.Tensor, "in in"] | None = None
    mean_abs: Float[torch.Tensor, " in"] | None = None
    cross: Float[torch.Tensor, "in in"] | None = None
    attention_gram: Float[torch.Tensor, "in in"] | None = None
    row_gram: Float[torch.Tensor, "heads row row"] | None = None
    head_gram: Float[torch.Tensor, "heads in in"] | None = None
    loss_gram: Float[torch.Tensor, "in in"] | None = None
    sensitivity: Float[torch.Tensor, "out in"] | None = None
    output_gram: Float[torch.Tensor, "out out"] | None = None
    max_abs: Float[torch.Tensor, " in"] | None = None
    sample: Float[torch.Tensor, "sample in"] | None = None
    held_out: HeldOut | None = None

    @classmethod
    def named(cls, tokens: int, found: Mapping[str, torch.Tensor]) -> "Stats":
        """Make statistics from tensors by their names."""
        values: Mapping[str, Any] = found
        return cls(tokens, **values)

    def to(self, device: torch.device) -> "Stats":
        """Return the statistics on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name in STATISTICS if (value := self.found(name)) is not None}
        return replace(self, **moved, held_out=self.held_out and self.held_out.to(device))

    def found(self, name: str) -> torch.Tensor | None:
        """Return a statistic by its name; None if it was not measured."""
        value: torch.Tensor | None = getattr(self, name)
        return value

    def rescaled(self, factor: Float[torch.Tensor, " in"]) -> "Stats":
        """Return the statistics for the input `x * factor` and the weight `w / factor`."""

        def twice(gram: torch.Tensor | None) -> torch.Tensor | None:
            return None if gram is None else gram * factor[:, None] * factor[None, :]

        return replace(
            self,
            gram=twice(self.gram),
            mean_abs=None if self.mean_abs is None else self.mean_abs * factor.abs(),
            max_abs=None if self.max_abs is None else self.max_abs * factor.abs(),
            sample=None if self.sample is None else self.sample * factor,
            cross=twice(self.cross),
            attention_gram=twice(self.attention_gram),
            head_gram=twice(self.head_gram),
            loss_gram=twice(self.loss_gram),
            sensitivity=None if self.sensitivity is None else self.sensitivity * factor.square(),
        )

    def shifted(self, shift: Float[torch.Tensor, " in"]) -> "Stats":
        """Return the statistics with magnitudes of `x - shift`, on the sample: those of what is rounded where a product sees x itself."""
        sample = None if self.sample is None else self.sample - shift
        largest = None if self.max_abs is None or sample is None else sample.abs().amax(0)
        return replace(self, sample=sample, max_abs=largest)

    def mapped(self, change: Map | None, rows: Map | None = None) -> "Stats":
        """Return the statistics for the input `change` x; `rows` is a change of basis of the layer's output.

        Statistics that cannot be known after the change are left out: mean_abs, max_abs and sensitivity in another basis, and under `rows`
        all statistics of output rows but the output_gram.
        """
        if isinstance(change, Chain):
            stats = self
            for part in change.maps:
                stats = stats.mapped(part)
            return stats.mapped(None, rows)
        changed = self
        if isinstance(change, Scale):
            changed = self.rescaled(change.scale)
        elif change is not None:
            by_channel = change.apply if isinstance(change, Permutation) else None

            def twice(gram: torch.Tensor | None) -> torch.Tensor | None:
                return None if gram is None else change.apply(change.apply(gram).mT).mT.contiguous()

            changed = replace(
                self,
                gram=twice(self.gram),
                mean_abs=None if self.mean_abs is None or by_channel is None else by_channel(self.mean_abs),
                max_abs=None if self.max_abs is None or by_channel is None else by_channel(self.max_abs),
                sample=None if self.sample is None else change.apply(self.sample),
                cross=twice(self.cross),
                attention_gram=twice(self.attention_gram),
                head_gram=twice(self.head_gram),
                loss_gram=twice(self.loss_gram),
                sensitivity=None if self.sensitivity is None or by_channel is None else by_channel(self.sensitivity),
            )
        if rows is None:
            return changed
        outputs = self.output_gram  # of gradients by y' where y = `rows` y'
        outputs = None if outputs is None else rows.apply_transposed(rows.apply_transposed(outputs).mT).mT.contiguous()
        return replace(changed, row_gram=None, head_gram=None, sensitivity=None, output_gram=outputs)

    def by_loss(self) -> "Stats":
        """Return the statistics with `loss_gram`, where it was measured, in the place of the gram."""
        return self if self.loss_gram is None else replace(self, gram=self.loss_gram)

    def need_gram(self, where: str) -> Float[torch.Tensor, "in in"]:
        """Return the gram. Raises CalibrationError if nothing was measured."""
        return self.need("gram", where)

    def need(self, name: str, where: str) -> torch.Tensor:
        """Return a statistic by its name. Raises CalibrationError if it was not measured."""
        value = self.found(name)
        if value is None or self.tokens == 0:
            raise CalibrationError(f"{where}: no calibration statistics reached this layer.")
        return value


class StatsCollector:
    """Sums up one layer's inputs, batch by batch, on the device where they are."""

    def __init__(self, needs: Collection[str], in_features: int, device: torch.device = CPU) -> None:
        self.needs = frozenset(needs)
        self.in_features = in_features
        self.tokens = 0
        size = native.gram_size(in_features)
        self._gram = torch.zeros(size, size, device=device) if "gram" in self.needs else None
        self._sum_abs = torch.zeros(in_features, dtype=torch.float64, device=device) if "mean_abs" in self.needs else None
        self._max_abs = torch.zeros(in_features, device=device) if "max_abs" in self.needs else None
        self._sample = _Sample() if "sample" in self.needs else None
        self._cross: torch.Tensor | None = None
        self._weighted: dict[WeightedGram, torch.Tensor] = {}
        self._held_out: list[HeldOut] = []

    def add(self, x: Float[torch.Tensor, "*batch in"], where: str) -> None:
        """Add a batch. Raises NumericsError, naming `where`, when a value is not finite."""
        x = x.reshape(-1, self.in_features)
        if not all_finite(x):
            raise NumericsError(f"{where}: the layer's input holds a NaN or an infinity during calibration.")
        if self._sample is not None:
            self._sample.add(x, self.tokens)
        self.tokens += x.shape[0]
        if self._gram is not None:
            # The product of bf16 values is exact in float32, so multiplying them in bf16 and adding in float32 loses nothing.
            if _is_native(x):
                native.add_gram_(self._gram, x.contiguous())
            else:
                with products_of(x.dtype):
                    add_gram_(self._gram[: self.in_features, : self.in_features], x.float())
        if self._sum_abs is not None:
            # A few tokens in float32 while they are in the processor's cache; the total in float64.
            for some in x.split(TOKENS_TOGETHER):
                self._sum_abs += some.abs().sum(0, dtype=torch.float32)
        if self._max_abs is not None and x.shape[0]:
            self._max_abs = torch.maximum(self._max_abs, x.abs().amax(0).float())

    def add_original(self, x: Float[torch.Tensor, "*batch in"], original: Float[torch.Tensor, "*batch in"]) -> None:
        """Add a batch with the input of this layer in the uncompressed model, token by token."""
        if self._cross is None:
            size = native.gram_size(self.in_features)
            self._cross = torch.zeros(size, size, device=x.device)
        given = x.reshape(-1, self.in_features).contiguous()
        difference = original.reshape(-1, self.in_features) - given
        if _is_native(x):
            native.add_product_(self._cross, difference, given)
        else:
            with products_of(x.dtype):
                self._cross[: self.in_features, : self.in_features].addmm_(difference.float().T, given.float())

    def add_weighted(
        self, kind: WeightedGram, x: Float[torch.Tensor, "*batch in"], weight: Float[torch.Tensor, " tokens"]
    ) -> None:
        """Add a batch whose tokens have weights to one of the weighted grams."""
        if kind not in self._weighted:
            self._weighted[kind] = torch.zeros(self.in_features, self.in_features, device=x.device)
        weighted = x.reshape(-1, self.in_features).float() * weight.sqrt()[:, None]
        with products_of(x.dtype):
            add_gram_(self._weighted[kind], weighted)

    def hold_out(self, x: Float[torch.Tensor, "*batch in"], whole: tuple[int, int] | None) -> None:
        """Keep a batch that no statistic counts; `whole` as for `held_out.hold_out`."""
        self._held_out.append(hold_out(x, whole))

    def finish(self) -> Stats:
        tokens = max(self.tokens, 1)
        gram = None
        if self._gram is not None:
            gram = mirrored(self._gram[: self.in_features, : self.in_features]).div_(tokens)
            self._gram = None
        mean_abs = None if self._sum_abs is None else (self._sum_abs / tokens).float()
        cross = None if self._cross is None else self._cross[: self.in_features, : self.in_features].div(tokens)
        weighted = {kind: mirrored(total).div_(tokens) for kind, total in self._weighted.items()}
        self._cross, self._weighted = None, {}
        return Stats(
            self.tokens,
            gram,
            mean_abs,
            cross,
            attention_gram=weighted.get("attention_gram"),
            loss_gram=weighted.get("loss_gram"),
            max_abs=self._max_abs,
            sample=None if self._sample is None else self._sample.rows(self.in_features),
            held_out=join_held_out(self._held_out),
        )


class _Sample:
    """Inputs of tokens whose multiples of `_SPREAD` are below a limit, which is halved when there are too many."""

    def __init__(self) -> None:
        self._limit, self._kept, self._places = 1 << 32, torch.empty(0, 0), torch.empty(0, dtype=torch.int64)

    def add(self, x: Float[torch.Tensor, "tokens in"], before: int) -> None:
        """Draw from a batch; `before` tokens were seen before it."""
        places = (torch.arange(before, before + len(x)) * _SPREAD) % (1 << 32)
        drawn = places < self._limit
        rows = x[drawn.to(x.device)].float()
        self._places = torch.cat([self._places, places[drawn]])
        self._kept = torch.cat([self._kept, rows]) if len(self._kept) else rows.clone()
        while len(self._places) > SAMPLE:
            self._limit //= 2
            stay = self._places < self._limit
            self._places, self._kept = self._places[stay], self._kept[stay.to(self._kept.device)]

    def rows(self, features: int) -> Float[torch.Tensor, "sample in"]:
        return self._kept if len(self._kept) else torch.empty(0, features)


def _is_native(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and "amx-bf16" in native.features()


def mirrored(gram: Float[torch.Tensor, "in in"]) -> Float[torch.Tensor, "in in"]:
    """Complete a gram of which only the upper tiles were summed: the lower ones are their mirror image."""
    upper = torch.triu(gram)
    return upper + torch.triu(upper, 1).T


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 values that bf16 holds exactly in bf16 if that is faster; the setting is global, so it is restored."""
    if dtype != torch.bfloat16 or not has_fast_bf16():
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def add_gram_(
    gram: Float[torch.Tensor, "in in"],
    x: Float[torch.Tensor, "tokens in"],
    other: Float[torch.Tensor, "tokens in"] | None = None,
) -> None:
    """Add x.T @ x to the tiles of `gram` on and above the diagonal; those below are left alone.

    With `other` it is x.T @ other, which has to be symmetric.
    """
    other = x if other is None else other
    n = gram.shape[0]
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        gram[start:stop, start:].addmm_(x[:, start:stop].T, other[:, start:])
