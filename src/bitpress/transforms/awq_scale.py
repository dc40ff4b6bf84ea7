"""AWQ's scaling: enlarge the weight columns whose inputs are large, so that rounding hurts them less.

Source   Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"; grid, clamp and
         normalisation as in the authors' public code (`auto_scale.py`).
Differs  the error is that of the sibling weights' outputs, computed exactly from the gram; the public code runs the attention or
         the feed-forward part on samples instead; any format; inputs made by one producer channel (grouped queries) take the mean of
         their mean_abs and share a factor, where the public code leaves such layers alone.
Needs    gram [in, in], mean_abs [in] float32.      Cost  O(grid * out * in^2) time, O(out * in) memory.
Update   s = mean_abs^alpha / sqrt(max * min),  alpha = argmin over i / grid of sum over siblings tr(D gram D'),
         D = Q(w * s) / s - w
Fails    CalibrationError when no token reached the weights. alpha = 0 is tried too, so the error is never larger than without scaling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["AWQScale"]

# A channel that is almost never used would otherwise get a factor near 0, and its neighbours one near infinity.
SMALLEST = 1e-4


@dataclass(frozen=True)
class AWQScale:
    """`run_time`: see `ScaleSearch`."""

    grid: int = 20
    run_time: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "scale input channels by a power of their mean magnitude, chosen by output error"
    paper: ClassVar[str] = "P207"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"grid={self.grid}: at least 1 exponent must be tried.")

    def plan(
        self,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        stats: InputStats,
        fmt: Format,
        channel_of: Int[torch.Tensor, " in"] | None = None,
        inputs: Format | None = None,
        producer: Float[torch.Tensor, " in"] | None = None,
    ) -> Float[torch.Tensor, " in"]:
        """Choose the factor of every input channel; see `ScaleSearch`."""
        if not weights:
            raise UsageError("awq-scale: a plan needs at least one weight.")
        if stats.gram is None or stats.mean_abs is None or stats.tokens == 0:
            raise CalibrationError("awq-scale: no calibration statistics reached these weights; gram and mean_abs are needed.")
        magnitude = stats.mean_abs.float()
        if channel_of is not None:
            magnitude = tie(magnitude, channel_of)
        error_of = OutputError(weights, stats.gram, fmt).of
        best = torch.ones_like(magnitude)
        best_error = error_of(best)
        for i in range(1, self.grid):
            factor = normalise(magnitude.pow(i / self.grid))
            error = error_of(factor)
            if error < best_error:
                best, best_error = factor, error
        return best


def tie(values: Float[torch.Tensor, " in"], channel_of: Int[torch.Tensor, " in"]) -> Float[torch.Tensor, " in"]:
    """Replace every value by the mean over the inputs that come from the same channel."""
    channels, channel_of = int(channel_of.max()) + 1, channel_of.to(values.device)
    total = torch.zeros(channels, device=values.device).index_add_(0, channel_of, values)
    count = torch.zeros(channels, device=values.device).index_add_(0, channel_of, torch.ones_like(values))
    return (total / count.clamp(min=1))[channel_of]


def normalise(factor: Float[torch.Tensor, " in"]) -> Float[torch.Tensor, " in"]:
    """Bound factors from below and centre their range on 1."""
    factor = factor.clamp(min=SMALLEST)
    return factor / (factor.max() * factor.min()).sqrt()


class OutputError:
    """The mean squared change of all outputs of sibling weights, summed over rows, when their scaled columns are rounded to nearest."""

    def __init__(
        self, weights: Sequence[Float[torch.Tensor, "_out in"]], gram: Float[torch.Tensor, "in in"], fmt: Format
    ) -> None:
        self.weights, self.gram, self.fmt = [w.float() for w in weights], gram, fmt
        self._upper: torch.Tensor | None = None
        if gram.device.type == "cpu" and "amx-bf16" in native.features():
            size = native.gram_size(gram.shape[0])
            self._upper = torch.zeros(size, size)
            self._upper[: gram.shape[0], : gram.shape[0]] = gram.triu() + gram.triu(1)

    def of(self, factor: Float[torch.Tensor, " in"]) -> float:
        """Return the error for a factor of every column."""
        differences = [self._difference(w, factor) for w in self.weights]
        if self._upper is None:
            return math.fsum(float((d @ self.gram).mul_(d).sum(dtype=torch.float64)) for d in differences)
        # tr(D G D') is the sum of G times D'D, which tiles of bf16 sum up in float32: only the differences are rounded to bf16.
        products = torch.zeros_like(self._upper)
        for d in differences:
            native.add_gram_(products, d.bfloat16())
        return float(products.mul_(self._upper).sum(dtype=torch.float64))

    def _difference(
        self, w: Float[torch.Tensor, "out in"], factor: Float[torch.Tensor, " in"]
    ) -> Float[torch.Tensor, "out in"]:
        scaled = w * factor
        params = self.fmt.fit(scaled)
        return (self.fmt.decode(self.fmt.encode(scaled, params), params) / factor).sub_(w)
