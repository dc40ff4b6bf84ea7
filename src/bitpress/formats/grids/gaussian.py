"""Gaussian grids: the levels, and the points of two and four dimensions, with the least mean squared error for normal weights.

Source   Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem" (HIGGS): after a
         Hadamard rotation weights are close to normal, so the grid best for a normal distribution is best for them. Levels: Max 1960,
         "Quantizing for Minimum Distortion"; those of 2, 3 and 4 bits are the ones of HIGGS's public code to the last float32 digit.
         Four dimensions: 256 points, the size that code built on the method loads for 2 bits (`EDEN4-256`).
Differs  the points are our own, from Lloyd's iteration with many starts; a test compares the error of those of the plane with that of
         the published ones. The rotation is a map of the weight, not part of the grid, and any block can have a scale, where the public code has
         one per rotated group.
Needs    gaussian_grids.json, made by scripts/build_gaussian_grids.py.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["gaussian_levels", "gaussian_points"]


def gaussian_levels(bits: int) -> tuple[float, ...]:
    """Return the 2^bits levels, rising; bits from 2 to 8."""
    upper = _grids()["levels"][str(bits)]
    return (*(-level for level in reversed(upper)), *upper)


def gaussian_points(bits: int, span: int = 2) -> tuple[tuple[float, ...], ...]:
    """Return the 2^bits points for `span` weights: 4, 6 or 8 bits for pairs, 8 bits for four."""
    points = _grids()["points"][str(bits)] if span == 2 else _grids()["spaces"][f"{bits}x{span}"]
    return tuple(tuple(point) for point in points)


@cache
def _grids() -> dict[str, dict[str, Any]]:
    grids: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("gaussian_grids.json").read_text("utf-8"))
    return grids
