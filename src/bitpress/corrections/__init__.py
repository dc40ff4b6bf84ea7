"""Corrections: terms beside a quantizer's codes, taken out of the weight before quantization or added for the error after it."""

from bitpress.corrections.correction import Correction
from bitpress.corrections.table import CORRECTIONS

__all__ = ["CORRECTIONS", "Correction"]
