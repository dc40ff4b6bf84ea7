"""Architectures that the native engine runs: one file a family, one table."""

from bitpress.runtime.native.architectures.layout import Architecture, Layout, Names, Rotation
from bitpress.runtime.native.architectures.table import ARCHITECTURES, RULES, describe, refusal

__all__ = ["ARCHITECTURES", "RULES", "Architecture", "Layout", "Names", "Rotation", "describe", "refusal"]
