"""Bits by the linearity theorem: what each layer's error costs the loss, measured by noise, and the options that a budget of bits buys.

    rise of the loss = sum over layers  alpha * error,     error = |w - w_hat|^2 / |w|^2

Source   Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem" (HIGGS): alpha of a
         layer is measured by noise in its weight alone, and the options of all layers are chosen together by `allocation.knapsack`.
Differs  alpha is the mean of rise / error over the noises, so that small noises count as much as large ones; an alpha below 0, which only
         chance can give, is 0. The budget is bits a weight with all parameters, not bits of codes.
Cost     the caller runs the model once for every layer and noise.

The order of work: for each layer, run the model with `w + sqrt(error * mean(w^2)) * normal` in the place of `w`, for every error of
`NOISES`; `measured_factors` of the rises; the errors and the bytes of every option of every layer; `spend`.
"""

import math
from collections.abc import Sequence

from bitpress.allocation.knapsack import choose_bits
from bitpress.errors import NumericsError, UsageError

__all__ = ["NOISES", "measured_factors", "spend"]

# Relative squared errors of about what 4, 3 and 2 bits leave of normal weights in pairs.
NOISES = (0.0077, 0.03, 0.107)


def measured_factors(rises: Sequence[Sequence[float]], noises: Sequence[float] = NOISES) -> tuple[float, ...]:
    """Return alpha of every layer from the rises of the loss that each noise in it made. Raises NumericsError for one that is not finite."""
    if not noises or any(not noise > 0 for noise in noises) or any(len(layer) != len(noises) for layer in rises):
        raise UsageError("measured_factors: every layer needs a rise for each noise, and noises are above 0.")
    if any(not math.isfinite(rise) for layer in rises for rise in layer):
        raise NumericsError("measured_factors: noise in a layer made the loss infinite or a NaN.")
    ratios = ([rise / noise for rise, noise in zip(layer, noises, strict=True)] for layer in rises)
    return tuple(max(math.fsum(layer) / len(noises), 0.0) for layer in ratios)


def spend(
    factors: Sequence[float],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    weights: Sequence[int],
    bits: float,
) -> tuple[int, ...]:
    """Return the option of every layer with the least rise of the loss, at no more than `bits` a weight on average.

    factors   alpha of every layer
    errors    relative squared error of every option of every layer
    sizes     bytes of every option
    weights   number of weights of every layer

    Raises UsageError if the smallest options exceed the budget.
    """
    if not len(factors) == len(errors) == len(sizes) == len(weights):
        raise UsageError("spend: factors, errors, sizes and weights need an entry for every layer.")
    if not math.isfinite(bits) or not bits > 0:
        raise UsageError(f"a budget of {bits} bits a weight: it must be above 0.")
    total = sum(weights)
    least = sum(min(layer, default=0) for layer in sizes)
    if 8 * least > bits * total:
        raise UsageError(
            f"a budget of {bits:g} bits a weight cannot be met: the smallest formats take {8 * least / max(total, 1):.3f}; "
            "raise it, or allow smaller formats."
        )
    rises = [[alpha * error for error in layer] for alpha, layer in zip(factors, errors, strict=True)]
    return choose_bits(rises, sizes, int(bits * total / 8))
