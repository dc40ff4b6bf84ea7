"""Observers: which range the static parameters of a rounded input serve.

An observer looks at the input of one product, batch by batch, and chooses the ends of a range; the number format makes its scale, and its
zero point where it has one, of these two values. All of them keep the running ends and a sample of fixed size, so one pass serves any of them.

A range always holds 0: what has padding or dead channels rounds 0 to 0.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError, NumericsError
from bitpress.formats import ActivationFormat, Format

__all__ = ["OBSERVERS", "Observer", "Seen", "static_format"]

# Values of an input that are kept of every batch, drawn evenly, for observers that compare ranges on values.
KEPT_OF_A_BATCH = 1 << 14
# Shares of the whole range that are tried.
SHARES = 64
# Bins of the histogram that the entropy compares.
BINS = 2048


@dataclass
class Seen:
    """What one input was, over all batches.

    ends     the least and the largest value of every batch
    values   samples of all batches
    """

    ends: list[tuple[float, float]] = field(default_factory=list)
    values: list[Float[torch.Tensor, " values"]] = field(default_factory=list)

    def add(self, x: Float[torch.Tensor, "*tokens in"]) -> None:
        """Take a batch. Raises NumericsError where it is not finite."""
        low, high = (float(end) for end in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NumericsError("the input holds a NaN or an infinity.")
        self.ends.append((low, high))
        flat = x.detach().flatten()
        # Steps of no common divisor with a power of two: a whole number of rows would look at the same channels again and again.
        step = max(flat.numel() // KEPT_OF_A_BATCH, 1) | 1
        self.values.append(flat[::step][:KEPT_OF_A_BATCH].float().clone())

    @property
    def range(self) -> tuple[float, float]:
        """Return the least and the largest value of all."""
        if not self.ends:
            raise CalibrationError("no calibration token reached this input; its static parameters cannot be chosen.")
        return min(low for low, _ in self.ends), max(high for _, high in self.ends)

    def sample(self) -> Float[torch.Tensor, " values"]:
        return torch.cat(self.values)


class Observer(Protocol):
    """One way to choose a range.

    summary   one line for lists
    source    where it is from
    """

    summary: ClassVar[str]
    source: ClassVar[str]

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        """Return the ends of the range that the format's parameters are made of."""
        ...


@dataclass(frozen=True)
class MinMax:
    summary: ClassVar[str] = "the least and the largest value seen"
    source: ClassVar[str] = "`MinMaxObserver` of torch.ao.quantization"

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        return seen.range


@dataclass(frozen=True)
class MovingAverage:
    """`momentum` is the weight of what was before."""

    momentum: float = 0.9

    summary: ClassVar[str] = "ends of batches, averaged with falling weights"
    source: ClassVar[str] = "`MovingAverageMinMaxObserver` of torch.ao.quantization, which gives a batch a weight of 0.01"

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

    def __post_init__(self) -> None:
        if not 50 < self.keep <= 100:
            raise ValueError(f"keep is {self.keep:g} percent, and must be above 50 and at most 100")

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        values, out = seen.sample().sort().values, (100 - self.keep) / 200
        cut = round(out * (values.numel() - 1))
        return float(values[cut]), float(values[-1 - cut])


@dataclass(frozen=True)
class SquaredError:
    summary: ClassVar[str] = "the range with the least mean squared error"
    source: ClassVar[str] = "`mse` of pytorch-quantization's `HistogramCalibrator`"

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        values = seen.sample()[None]

        def error(ends: tuple[float, float]) -> float:
            return float((static_format(fmt, ends).round(values) - values).square().mean(dtype=torch.float64))

        return min(_shares(seen), key=error)


@dataclass(frozen=True)
class Entropy:
    summary: ClassVar[str] = "the range whose codes keep the most of the histogram (Kullback-Leibler divergence)"
    source: ClassVar[str] = "`entropy` of pytorch-quantization's `HistogramCalibrator`"

    def choose(self, seen: Seen, fmt: Format) -> tuple[float, float]:
        values, (low, high) = seen.sample(), seen.range
        counts = torch.histc(values, BINS, low, high) if high > low else torch.ones(BINS)
        middles = torch.linspace(low, high, BINS + 1)[:-1] + (high - low) / (2 * BINS)

        def divergence(ends: tuple[float, float]) -> float:
            # Clipped values count at the ends, as they will be; every code spreads its values evenly over the bins that it stands for.
            inside = (middles >= ends[0]) & (middles <= ends[1])
            if not bool(inside.any()):
                return math.inf
            p = counts.double() * inside
            places = inside.nonzero()[:, 0]
            p[places[0]] += counts[: places[0]].sum()
            p[places[-1]] += counts[places[-1] + 1 :].sum()
            codes = static_format(fmt, ends).round(middles[inside][None])[0]
            _, which = torch.unique(codes, return_inverse=True)
            taken, there = counts[inside].double(), (counts[inside] > 0).double()
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
}


def static_format(fmt: Format, ends: tuple[float, float]) -> ActivationFormat:
    """Return a format with the static parameters of a range. Raises NumericsError for one that they cannot hold."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    sample = torch.tensor([low, high]).repeat(max(fmt.grid.span, 2) // 2)[None]
    made = ActivationFormat.static(fmt, fmt.fit(sample))
    made.check()
    return made


def _shares(seen: Seen) -> list[tuple[float, float]]:
    """Return the whole range first, then smaller ones."""
    low, high = seen.range
    return [(low * k / SHARES, high * k / SHARES) for k in range(SHARES, 0, -1)]
