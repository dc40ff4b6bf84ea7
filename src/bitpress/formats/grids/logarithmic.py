"""Logarithmic levels: powers of two, or of its square root, below the scale, and a zero.

Source   "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale
         Reparameterization", and the public code of its forerunner RepQ-ViT: level k is 2^(-k/2) times the scale, values below the
         last level are zero.
Differs  that quantizer is for attention probabilities, without a sign; here the highest bit is a sign. Its zero has no code; here zero
         is the last k. It rounds the logarithm; here the nearest level is taken, so the boundary between 1 and 2^-1 is 0.75 instead
         of 0.707, which has the smaller squared error.

    logN        sign, then N - 1 bits k: (-1)^s * 2^-k,      zero for the largest k
    sqrtlogN    sign, then N - 1 bits k: (-1)^s * 2^(-k/2),  zero for the largest k

logN holds the values of a minifloat without mantissa, e(N-1)m0, in another order and with the largest at 1. `log4-g16-e8m0` is the
block logarithm of Zhang et al. 2023, with a zero in addition.

    >>> logarithmic(3)
    (1.0, 0.5, 0.25, 0.0, -1.0, -0.5, -0.25, -0.0)
"""

__all__ = ["logarithmic"]


def logarithmic(bits: int, steps: int = 1) -> tuple[float, ...]:
    """Return the levels of `bits` bits, with `steps` levels per halving."""
    magnitudes = [2.0 ** (-k / steps) for k in range((1 << (bits - 1)) - 1)] + [0.0]
    return (*magnitudes, *(-m for m in magnitudes))
