"""The utilization of the quantization space: how much of the box that a common scale spans is filled by the data.

    u = V(ellipsoid of the data)^(1/d) / edge of the box,     edge = 2 max |x|

Source   Hu et al. 2025, "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better
         Distribution Fitting" (P188): its abstract is what could be read, and the caption of a figure, in which the eigenvalues of the covariance
         spread the data along its principal axes.
Differs  the d-th root of the ratio of volumes, as the ratio itself is 0 in hundreds of dimensions. The ellipsoid is the one in which evenly
         spread data have the same second moments, means included, which are rounded too. Data of fewer vectors than dimensions span as many
         dimensions as there are vectors. Axes with less than a millionth of the largest spread are left out.
Needs    vectors [n, channels], of which at most SAMPLE are taken.      Cost  O(SAMPLE^2 channels) operations.
Update   u = r_d sqrt(d + 2) (prod of sqrt(l_i))^(1/d) / (2 max |x|),  l the eigenvalues of x'x / n, r_d^d the volume of the unit ball

A rotation leaves the ellipsoid as it is, and changes the box alone. Evenly spread values have about 1.2, normal ones about 0.5, one channel that is
30 times as large as the others divides that by about 27.
"""

import math

import torch
from jaxtyping import Float

__all__ = ["SAMPLE", "sampled", "utilization"]

# Vectors that are taken of the data, evenly.
SAMPLE = 256
LEAST = 1e-12


def sampled(x: Float[torch.Tensor, "n channels"]) -> Float[torch.Tensor, "some channels"]:
    """Return at most SAMPLE vectors, evenly spaced."""
    return x[:: max(1, -(-len(x) // SAMPLE))]


def utilization(x: Float[torch.Tensor, "n channels"]) -> float | None:
    """Return the utilization of a sample of vectors; None where all are 0 or one is not finite."""
    x = sampled(x).double()
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not 0 < largest < math.inf:
        return None
    x = x / largest
    moments = (x @ x.T if len(x) < x.shape[1] else x.T @ x) / len(x)
    spread = torch.linalg.eigvalsh(moments)
    spread = spread[spread > LEAST * spread[-1]]
    d = len(spread)
    unit_ball = 0.5 * math.log(math.pi) - math.lgamma(d / 2 + 1) / d
    return math.exp(unit_ball + 0.5 * math.log(d + 2) + 0.5 * float(spread.log().mean())) / 2
