"""Logarithmic levels: powers of two, or of its square root, below the scale, and a zero.

Source   "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale
         Reparameterization", and the public code of its forerunner RepQ-ViT: level k is 2^(-k/2) times the scale, what lies below the
         last level is zero.
Differs  that quantizer serves attention probabilities, which have no sign; here a sign bit stands above k. Its zero is not a code,
         here it is the last k. It rounds the logarithm; here the nearest level is taken, so that the middle of 1 and 2^-1 is 0.75 and
         not 0.707, which has the smaller squared error.

    logN        sign, then N - 1 bits k: (-1)^s * 2^-k,      zero for the largest k
    sqrtlogN    sign, then N - 1 bits k: (-1)^s * 2^(-k/2),  zero for the largest k

logN holds the values of a minifloat without mantissa, e(N-1)m0, in another order and with the largest at 1. `log4-g16-e8m0` is the
block logarithm of Zhang et al. 2023, but for its zero, which theirs lacks.

    >>> logarithmic(3)
    (1.0, 0.5, 0.25, 0.0, -1.0, -0.5, -0.25, -0.0)
"""

__all__ = ["logarithmic"]


def logarithmic(bits: int, steps: int = 1) -> tuple[float, ...]:
    """Return the levels of this width, with `steps` of them for every halving."""
    magnitudes = [2.0 ** (-k / steps) for k in range((1 << (bits - 1)) - 1)] + [0.0]
    return (*magnitudes, *(-m for m in magnitudes))
