"""Bits by the linearity theorem: what each layer's error costs the loss, and the options that a budget of bits buys.

    rise of the loss = sum over layers  alpha * error,     error = |w - w_hat|^2 / |w|^2

Source   Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem" (HIGGS): alpha of a
         layer is measured by noise in its weight alone, and the options of all layers are chosen together by `allocation.knapsack`.
Differs  alpha is the limit of rise / error for small noise, where the loss is the KL divergence from the original: half of mean(w^2) times
         the trace of the layer's Fisher information (`curved_factors`), which one pass back measures for all layers together. The paper
         runs the model with noise in each layer in turn (`measured_factors`: the mean of rise / error over the noises, so that small ones
         count as much as large ones; an alpha below 0, which only chance can give, is 0): the reference that the limit is tested against.
         The budget is bits a weight with all parameters, not bits of codes.
Cost     `curved_factors` a pass back and forth, `measured_factors` a pass for every layer and noise.

The order of work: the traces (`pipeline.gradients.measure_curvature`) and `curved_factors`, or for each layer the model's loss with
`w + sqrt(error * mean(w^2)) * normal` in the place of `w` for every error of `NOISES`, and `measured_factors` of the rises; then the
errors and the bytes of every option of every layer; `spend`.
"""

import math
from collections.abc import Sequence

from bitpress.allocation.knapsack import choose_bits
from bitpress.errors import NumericsError, UsageError

__all__ = ["NOISES", "check_budget", "curved_factors", "measured_factors", "spend"]

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


def curved_factors(traces: Sequence[float], mean_squares: Sequence[float]) -> tuple[float, ...]:
    """Return alpha of every layer from the trace of its Fisher information and the mean square of its weights.

    Noise of relative error e has the variance e * mean(w^2), and adds half of the variance times the trace to the loss.
    """
    if len(traces) != len(mean_squares):
        raise UsageError("curved_factors: every layer needs a trace and a mean square.")
    factors = tuple(trace * square / 2 for trace, square in zip(traces, mean_squares, strict=True))
    if any(not math.isfinite(alpha) or alpha < 0 for alpha in factors):
        raise NumericsError("curved_factors: the curvature of the loss is infinite, a NaN or below 0.")
    return factors


def check_budget(sizes: Sequence[Sequence[int]], weights: Sequence[int], bits: float) -> None:
    """Raise UsageError unless the smallest options of all layers take `bits` a weight or fewer."""
    if not math.isfinite(bits) or not bits > 0:
        raise UsageError(f"a budget of {bits} bits a weight: it must be above 0.")
    total = sum(weights)
    least = sum(min(layer, default=0) for layer in sizes)
    if 8 * least > bits * total:
        raise UsageError(
            f"a budget of {bits:g} bits a weight cannot be met: the smallest formats take {8 * least / max(total, 1):.3f}; "
            "raise it, or allow smaller formats."
        )


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
    check_budget(sizes, weights, bits)
    rises = [[alpha * error for error in layer] for alpha, layer in zip(factors, errors, strict=True)]
    return choose_bits(rises, sizes, int(bits * sum(weights) / 8))
