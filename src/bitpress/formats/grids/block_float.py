"""Block floats: signed mantissas of a few bits under one power of two that a block shares, and OCP's 8-bit member of the family.

Source   Zhang et al. 2023, "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM Inference?", and its public code
         for block floating point; "Accurate Block Quantization in LLMs with Outliers" uses the same format.
         MXINT8: emax 0, six places after the point and a largest magnitude of 127/64, as in Microsoft's public emulation of OCP MX.
Differs  the code shares ceil(log2(largest)), here floor(log2(largest)) + 1: the same but for an exact power of two, which the code
         clips to the mantissa below and which is exact here. A mantissa is never -0 but for negative weights that round to zero.
         MXINT8 uses the code of -2, where the emulation stops at -127/64.

    bfpN      sign, then N - 1 bits of magnitude: (-1)^s * m * 2^(e - (N - 2)),  e = floor(log2(largest magnitude of the block))
    mxint8    two's complement times 2^-6: -2 to 1 63/64, times the block's 2^e

The other two formats of the first paper need no grid of their own:

    block minifloat     eXmY under e8m0: `e2m1-g16-e8m0`, with the better of the two powers of two around the scale that clips nothing
    block logarithm     logN under e8m0: `log4-g16-e8m0`

    >>> signed_magnitudes(3)
    (0.0, 1.0, 2.0, 3.0, -0.0, -1.0, -2.0, -3.0)
    >>> twos_complement(8)[1], twos_complement(8)[128]
    (0.015625, -2.0)
"""

__all__ = ["signed_magnitudes", "twos_complement"]


def signed_magnitudes(bits: int) -> tuple[float, ...]:
    """Return the levels of a sign bit above `bits` - 1 bits of magnitude."""
    magnitudes = [float(m) for m in range(1 << (bits - 1))]
    return (*magnitudes, *(-m for m in magnitudes))


def twos_complement(bits: int) -> tuple[float, ...]:
    """Return the levels of a two's complement number with two places before the binary point, the sign among them."""
    half = 1 << (bits - 1)
    return tuple((code - 2 * half if code >= half else code) / (half / 2) for code in range(2 * half))
