"""Smoothing: families of channel factors that move what is large in inputs into the weights, and the choice of one by its error.

    power         s = x^alpha / w^(1 - alpha)      x, w: magnitudes of the channels of inputs and of the columns of weights
    beyond        s = max(1, x / limit)            channels within the limit stay as they are
    logarithmic   s = x / log2(2 + x)

Papers differ in the family, in what the magnitudes are, and in who chooses the strength. Inputs made by one producer channel share a factor:
theirs is that of their mean magnitude.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.transforms.awq_scale import normalise, tie
from bitpress.transforms.transform import InputStats

__all__ = ["ProductError", "beyond", "bounded", "check_weights", "column_sizes", "input_sizes", "least", "logarithmic", "power"]


def input_sizes(
    sizes: Float[torch.Tensor, " in"] | None, tokens: int, channel_of: Int[torch.Tensor, " in"] | None, where: str, needs: str
) -> Float[torch.Tensor, " in"]:
    """Return the magnitudes of an input's channels, those of one producer channel alike. Raises CalibrationError where there are none."""
    if sizes is None or tokens == 0:
        raise CalibrationError(f"{where}: no calibration statistics reached these weights; {needs} is needed.")
    return sizes.float() if channel_of is None else tie(sizes.float(), channel_of)


def check_weights(weights: Sequence[Float[torch.Tensor, "_out in"]], where: str) -> None:
    """Raise UsageError where there is no weight."""
    if not weights:
        raise UsageError(f"{where}: a plan needs at least one weight.")


def column_sizes(
    weights: Sequence[Float[torch.Tensor, "_out in"]], channel_of: Int[torch.Tensor, " in"] | None, where: str
) -> Float[torch.Tensor, " in"]:
    """Return the largest magnitude of every column of weights that share an input. Raises UsageError where there is no weight."""
    check_weights(weights, where)
    columns = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    return columns if channel_of is None else tie(columns, channel_of)


def bounded(magnitude: Float[torch.Tensor, " in"]) -> Float[torch.Tensor, " in"]:
    """Return magnitudes relative to the largest, at least 1e-5: a channel without input or without weights has the magnitude 0."""
    largest = magnitude.max()
    return (magnitude / largest).clamp(min=1e-5) if largest > 0 else torch.ones_like(magnitude)


def power(inputs: Float[torch.Tensor, " in"], columns: Float[torch.Tensor, " in"], alpha: float) -> Float[torch.Tensor, " in"]:
    """Return the factors of one strength, their range centred on 1, from bounded magnitudes."""
    return normalise(inputs.pow(alpha) / columns.pow(1 - alpha))


def beyond(inputs: Float[torch.Tensor, " in"], limit: float) -> Float[torch.Tensor, " in"]:
    """Return the factors that bring larger channels down to a limit above 0, and leave all others alone."""
    return (inputs / limit).clamp(min=1.0)


def logarithmic(inputs: Float[torch.Tensor, " in"]) -> Float[torch.Tensor, " in"]:
    """Return the factors after which channels are as large as the logarithm of what they were. Magnitudes are at least 1e-5 of the largest."""
    largest = inputs.max()
    inputs = inputs.clamp(min=1e-5 * float(largest)) if largest > 0 else torch.ones_like(inputs)
    return inputs / torch.log2(2 + inputs)


class ProductError:
    """The mean squared change of all outputs of sibling weights for a sample of inputs, when columns are multiplied by factors, inputs
    divided by them, and both are rounded to nearest. Without a format of inputs only the weights are rounded."""

    def __init__(
        self,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        sample: Float[torch.Tensor, "tokens in"],
        fmt: Format,
        inputs: Format | None,
    ) -> None:
        self.weights, self.sample, self.fmt, self.inputs = [w.float() for w in weights], sample.float(), fmt, inputs
        self.outputs = [self.sample @ w.T for w in self.weights]

    @classmethod
    def on(
        cls,
        stats: InputStats,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        fmt: Format,
        inputs: Format | None,
        where: str,
    ) -> "ProductError":
        """Return the error on the sample that calibration drew. Raises CalibrationError where it drew none."""
        if stats.sample is None or len(stats.sample) == 0:
            raise CalibrationError(f"{where}: no calibration statistics reached these weights; sample is needed.")
        return cls(weights, stats.sample, fmt, inputs)

    def of(self, factor: Float[torch.Tensor, " in"]) -> float:
        """Return the error for a factor of every column."""
        x = self.sample / factor
        x = x if self.inputs is None else fake_quantize(x, self.inputs)
        pairs = zip(self.weights, self.outputs, strict=True)
        return math.fsum(float((x @ fake_quantize(w * factor, self.fmt).T - y).square().sum()) for w, y in pairs) / len(x)


def least(
    factors: Iterable[Float[torch.Tensor, " in"]], error_of: Callable[[Float[torch.Tensor, " in"]], float]
) -> Float[torch.Tensor, " in"]:
    """Return the factors of least error, the first of equals; a search that is to be no worse than no smoothing begins with ones."""
    tried = [(error_of(factor), i, factor) for i, factor in enumerate(factors)]
    return min(tried, key=lambda entry: entry[:2])[2]
