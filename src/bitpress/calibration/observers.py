"""Observers: which range the static parameters of a rounded input serve.

An observer looks at the input of one product, batch by batch, and chooses the ends of a range; the number format makes its scale, and its
zero point where it has one, of these two values. All of them keep the running ends, a sample of single values and some whole tokens, so one
pass serves any of them.

A range always holds 0: what has padding or dead channels rounds 0 to 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError, NumericsError
from bitpress.formats import ActivationFormat, Format

__all__ = ["OBSERVERS", "Observer", "Seen", "static_format"]

# Values of an input that are kept of every batch: drawn at random, and the largest and smallest of all beside them.
KEPT_OF_A_BATCH, KEPT_AT_AN_END = 1 << 14, 256
# Tokens of a batch that are kept whole.
KEPT_TOKENS = 16
# Shares of the whole range that are tried.
SHARES = 64
# Bins of the histogram that the entropy compares.
BINS = 2048


@dataclass
class Seen:
    """What one input was, over all batches, on the host.

    ends     the least and the largest value of every batch
    values   of every batch the smallest and largest values, each counted once, and some of the others, drawn evenly
    counts   how many values each of them stands for
    tokens   some tokens of every batch as they are, drawn evenly
    product  what the product makes of tokens behind the map of its weight, on the host, where an observer looks at that
    """

    ends: list[tuple[float, float]] = field(default_factory=list)
    values: list[Float[torch.Tensor, " values"]] = field(default_factory=list)
    counts: list[Float[torch.Tensor, " values"]] = field(default_factory=list)
    tokens: list[Float[torch.Tensor, "some in"]] = field(default_factory=list)
    product: Callable[[Float[torch.Tensor, "some in"]], Float[torch.Tensor, "some out"]] | None = None

    def add(self, x: Float[torch.Tensor, "*tokens in"]) -> None:
        """Take a batch. Raises NumericsError where it is not finite."""
        low, high = (float(end) for end in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NumericsError("the input holds a NaN or an infinity.")
        flat = x.detach().flatten().float()
        if flat.numel() <= KEPT_OF_A_BATCH:
            some, counts = flat.clone().cpu(), torch.ones(flat.numel())
        else:
            some, counts = _drawn(flat, seed=len(self.ends))
        rows = x.detach().reshape(-1, x.shape[-1])
        order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(len(self.ends)))
        self.tokens.append(rows[order[:KEPT_TOKENS].sort().values.to(x.device)].float().cpu())
        self.ends.append((low, high))
        self.values.append(some)
        self.counts.append(counts)

    @property
    def range(self) -> tuple[float, float]:
        """Return the least and the largest value of all."""
        if not self.ends:
            raise CalibrationError("no calibration token reached this input; its static parameters cannot be chosen.")
        return min(low for low, _ in self.ends), max(high for _, high in self.ends)

    @property
    def always_zero(self) -> bool:
        """Whether no value but 0 was seen."""
        return self.range == (0.0, 0.0)

    def whole(self) -> Float[torch.Tensor, "some in"]:
        """Return the tokens that were kept. Raises CalibrationError where there are none."""
        _ = self.range  # raises
        return torch.cat(self.tokens)

    def sample(self) -> tuple[Float[torch.Tensor, " values"], Float[torch.Tensor, " values"]]:
        """Return values, and how many each stands for, in float64."""
        return torch.cat(self.values), torch.cat(self.counts).double()


def _drawn(flat: Float[torch.Tensor, " all"], seed: int) -> tuple[Float[torch.Tensor, " some"], Float[torch.Tensor, " some"]]:
    """Return both ends of many values and some of the others, and how many each of them stands for, on the host."""
    top, bottom = flat.topk(KEPT_AT_AN_END).values.cpu(), flat.topk(KEPT_AT_AN_END, largest=False).values.cpu()
    at = torch.randint(flat.numel(), (KEPT_OF_A_BATCH,), generator=torch.Generator().manual_seed(seed))
    others = flat[at.to(flat.device)].cpu()
    others = others[(others < top[-1]) & (others > bottom[-1])]
    left = flat.numel() - 2 * KEPT_AT_AN_END
    if not others.numel():  # most values are those of the ends
        return torch.cat([top, bottom]), torch.full((2 * KEPT_AT_AN_END,), flat.numel() / (2 * KEPT_AT_AN_END))
    ones = torch.ones(2 * KEPT_AT_AN_END)
    return torch.cat([top, bottom, others]), torch.cat([ones, torch.full((others.numel(),), left / others.numel())])


LooksAt = Literal["values", "tokens", "product"]


class Observer(Protocol):
    """One way to choose a range.

    summary   one line for lists
    source    where it is from
    looks_at  single values; whole tokens, which probabilities have not, as these have as many values as there are keys; or what a product
              makes of them, which is known of inputs of linear layers alone
    local     whether it serves a scale that stands above those of groups
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    looks_at: ClassVar[LooksAt]
    local: ClassVar[bool]

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        """Return the ends of the range that the format's parameters are made of."""
        ...


@dataclass(frozen=True)
class MinMax:
    summary: ClassVar[str] = "the least and the largest value seen"
    source: ClassVar[str] = "`MinMaxObserver` of torch.ao.quantization"
    looks_at: ClassVar[LooksAt] = "values"
    local: ClassVar[bool] = True

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        return seen.range


@dataclass(frozen=True)
class MovingAverage:
    """`momentum` is the weight of what was before."""

    momentum: float = 0.9

    summary: ClassVar[str] = "ends of batches, averaged with falling weights"
    source: ClassVar[str] = "`MovingAverageMinMaxObserver` of torch.ao.quantization, which gives a batch a weight of 0.01"
    looks_at: ClassVar[LooksAt] = "values"
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum:g}, and must be at least 0 and below 1")

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        if not seen.ends:
            return seen.range  # raises
        low, high = seen.ends[0]
        for a, b in seen.ends[1:]:
            low, high = self.momentum * low + (1 - self.momentum) * a, self.momentum * high + (1 - self.momentum) * b
        return low, high


@dataclass(frozen=True)
class Percentile:
    """`keep` is the share of values inside the range, in percent; as many are left out at both ends."""

    keep: float = 99.99

    summary: ClassVar[str] = "the range that holds a share of all values"
    source: ClassVar[str] = "`percentile` of pytorch-quantization's `HistogramCalibrator`"
    looks_at: ClassVar[LooksAt] = "values"
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 50 < self.keep <= 100:
            raise ValueError(f"keep is {self.keep:g} percent, and must be above 50 and at most 100")

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        values, counts = seen.sample()
        order = values.argsort()
        below, out = counts[order].cumsum(0), (100 - self.keep) / 200
        low, high = (int(torch.searchsorted(below, share * below[-1])) for share in (out, 1 - out))
        return float(values[order[low]]), float(values[order[min(high, len(order) - 1)]])


@dataclass(frozen=True)
class SquaredError:
    summary: ClassVar[str] = "the range with the least mean squared error"
    source: ClassVar[str] = "`mse` of pytorch-quantization's `HistogramCalibrator`"
    looks_at: ClassVar[LooksAt] = "values"
    local: ClassVar[bool] = True

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        if fmt.block.name != "tensor":  # values that share a scale are those of a token side by side
            return _least_error(seen, fmt, lambda difference: difference)
        values, counts = seen.sample()

        def error(ends: tuple[float, float]) -> float:
            return float((static_format(fmt, ends).round(values[None])[0] - values).double().square() @ counts)

        return min(_shares(seen), key=error)


@dataclass(frozen=True)
class ChannelPercentile:
    """`keep` is the share of the tokens' values inside the range of a channel, in percent; as many are left out at both ends."""

    keep: float = 99.0

    summary: ClassVar[str] = "the widest of the channels' ranges that each hold a share of its values over tokens"
    source: ClassVar[str] = (
        'the percentile over tokens of Zhang et al. 2023, "Dual Grained Quantization" (P267), which smooths channels by it'
    )
    looks_at: ClassVar[LooksAt] = "tokens"
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Percentile(self.keep)  # raises

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        out = (100 - self.keep) / 200
        ends = torch.quantile(seen.whole(), torch.tensor([out, 1 - out]), dim=0)
        return float(ends[0].min()), float(ends[1].max())


@dataclass(frozen=True)
class OutputError:
    summary: ClassVar[str] = "the range with the least squared error of what the product makes of the input"
    source: ClassVar[str] = "none; the objective of the quantizers of weights, taken over the input's range"
    looks_at: ClassVar[LooksAt] = "product"
    local: ClassVar[bool] = True

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        assert seen.product is not None
        return _least_error(seen, fmt, seen.product)


@dataclass(frozen=True)
class Entropy:
    summary: ClassVar[str] = "the range whose codes keep the most of the histogram (Kullback-Leibler divergence)"
    source: ClassVar[str] = "`entropy` of pytorch-quantization's `HistogramCalibrator`"
    looks_at: ClassVar[LooksAt] = "values"
    local: ClassVar[bool] = False

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        (values, weights), (low, high) = seen.sample(), seen.range
        counts = torch.zeros(BINS, dtype=torch.float64)
        places = ((values.double() - low) / max(high - low, 1e-300) * BINS).long().clamp(0, BINS - 1)
        counts.index_add_(0, places, weights)
        middles = torch.linspace(low, high, BINS + 1)[:-1] + (high - low) / (2 * BINS)

        def divergence(ends: tuple[float, float]) -> float:
            # Clipped values count at the ends, as they will be; every code spreads its values evenly over the bins that it stands for.
            inside = (middles >= ends[0]) & (middles <= ends[1])
            if not bool(inside.any()):
                return math.inf
            p = counts * inside
            places = inside.nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1])
            p[first] += counts[:first].sum()
            p[last] += counts[last + 1 :].sum()
            codes = static_format(fmt, ends).round(middles[inside][None])[0]
            _, which = torch.unique(codes, return_inverse=True)
            taken, there = counts[inside], (counts[inside] > 0).double()
            total, filled = torch.zeros(2, int(which.max()) + 1, dtype=torch.float64).scatter_add_(
                1, which.expand(2, -1), torch.stack([taken, there])
            )
            q = (total / filled.clamp_min(1))[which] * there
            p, q = p[inside] / p.sum(), q / q.sum().clamp_min(1e-12)
            some = p > 0
            return float((p[some] * (p[some] / q[some].clamp_min(1e-12)).log()).sum())

        return min(_shares(seen), key=divergence)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": SquaredError,
    "entropy": Entropy,
    "channel-percentile": ChannelPercentile,
    "output": OutputError,
}


def static_format(fmt: Format, ends: tuple[float, float]) -> ActivationFormat:
    """Return a format with the stored parameters of a range: all of them for a whole tensor, of groups the scale above theirs.

    Raises NumericsError for a range that they cannot hold.
    """
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if low == high:  # an input that was always 0, which any scale holds
        high = 1.0
    if fmt.block.name == "tensor":
        sample = torch.tensor([low, high]).repeat(max(fmt.grid.span, 2) // 2)[None]
        made = ActivationFormat.static(fmt, fmt.fit(sample))
    else:
        width = fmt.block.cols if isinstance(fmt.block.cols, int) else max(fmt.grid.span, 2)
        sample = torch.tensor([low, high]).repeat(width)[None, :width]
        made = ActivationFormat.local(fmt, fmt.fit(sample))
    made.check()
    return made


def _least_error(
    seen: Seen, fmt: Format, product: Callable[[Float[torch.Tensor, "some in"]], Float[torch.Tensor, "some out"]]
) -> tuple[float, float]:
    """Return the ends under which what a product makes of the rounding error of whole tokens is least."""
    tokens = seen.whole()

    def error(ends: tuple[float, float]) -> float:
        return float(product(static_format(fmt, ends).round(tokens) - tokens).double().square().sum())

    return min(_shares(seen), key=error)


def _shares(seen: Seen) -> list[tuple[float, float]]:
    """Return the whole range first, then smaller ones."""
    low, high = seen.range
    return [(low * k / SHARES, high * k / SHARES) for k in range(SHARES, 0, -1)]
