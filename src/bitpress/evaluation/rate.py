"""Rate and distortion of number formats on matrices: stored bits and error.

    bits      bytes of everything stored for the matrices, times 8, over their weights
    error     sum of (w_hat - w)^2 over sum of w^2, both over all matrices
    snr_db    -10 log10(error)
    gap_db    20 log10(2) * bits - snr_db: how far below the Gaussian bound, 6.02 dB being worth a bit

The bound is the rate-distortion function of independent Gaussian numbers of variance 1, D(R) = 2^(-2R): no code of R bits a weight
has less error. Of all sources of one variance the Gaussian is the hardest. On other data a format may be better than the bound (a
negative gap): if blocks differ in size and their scales follow, or if weights lie on a grid already.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError
from bitpress.formats import Format, Packed

__all__ = ["DB_PER_BIT", "SOURCES", "Rate", "best_rows", "draw_source", "measure_rates"]

DB_PER_BIT = 20 * math.log10(2)
SOURCES = ("gaussian", "laplace", "student5")


@dataclass(frozen=True)
class Rate:
    """One format on one set of matrices. `skipped` counts those whose shape its block does not divide."""

    format: str
    clip: str
    nbytes: int
    weights: int
    error: float
    matrices: int
    skipped: int

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.weights

    @property
    def snr_db(self) -> float:
        """Infinite where nothing is lost."""
        return -10 * math.log10(self.error) if self.error > 0 else math.inf

    @property
    def gap_db(self) -> float:
        return DB_PER_BIT * self.bits_per_weight - self.snr_db

    def as_dict(self) -> dict[str, Any]:
        """Return every figure; None for a ratio without a value, if nothing is lost."""
        lossless = self.error == 0
        return {
            "format": self.format,
            "clip": self.clip,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "snr_db": None if lossless else self.snr_db,
            "gap_db": None if lossless else self.gap_db,
            "bytes": self.nbytes,
            "weights": self.weights,
            "matrices": self.matrices,
            "skipped": self.skipped,
        }


@dataclass
class _Sums:
    nbytes: int = 0
    weights: int = 0
    lost: float = 0.0
    energy: float = 0.0
    matrices: int = 0
    skipped: int = 0


def measure_rates(
    matrices: Iterable[tuple[str, Float[torch.Tensor, "out in"]]],
    formats: Sequence[Format],
    clips: Mapping[str, Sequence[float]],
    note: Callable[[str, str], None] = lambda matrix, fmt: None,
) -> tuple[list[Rate], dict[str, str]]:
    """Round every matrix to the nearest codes of every format, pack it, and return the rows, and the refused formats with a reason.

    `clips` names the ratios that a fit tries on each block's range (`Format.fit`). A grid that learns its levels is measured with the
    first ratio alone, since it has no range to shrink. `note` is called after each finished pair.
    """
    sums: dict[tuple[str, str], _Sums] = {}
    refused: dict[str, str] = {}
    for name, w in matrices:
        w = w.float()
        energy = float(w.double().square().sum())
        for fmt in formats:
            names = list(clips)[:1] if _learns(fmt) else list(clips)
            for clip in names:
                into = sums.setdefault((fmt.name, clip), _Sums())
                try:
                    fmt.block_grid((w.shape[0], w.shape[1]))
                    lost, nbytes = _round(w, fmt, clips[clip])
                except (FormatError, NumericsError) as error:
                    into.skipped += 1
                    refused.setdefault(fmt.name, f"{name}: {error}")
                    continue
                into.nbytes, into.weights, into.matrices = into.nbytes + nbytes, into.weights + w.numel(), into.matrices + 1
                into.lost, into.energy = into.lost + lost, into.energy + energy
            note(name, fmt.name)
    rows = [
        Rate(fmt, clip, s.nbytes, s.weights, s.lost / s.energy if s.energy else 0.0, s.matrices, s.skipped)
        for (fmt, clip), s in sums.items()
        if s.matrices
    ]
    return rows, refused


def draw_source(name: str, shape: tuple[int, int], seed: int = 0) -> Float[torch.Tensor, "out in"]:
    """Draw independent numbers of mean 0: gaussian, laplace, or student5 (Student's t of 5 degrees, heavy tails)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "gaussian":
        return torch.randn(shape, generator=generator)
    if name == "laplace":
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * torch.empty(shape).exponential_(generator=generator)
    assert name == "student5", name
    chi_squared = torch.randn(5, *shape, generator=generator).square().sum(0)
    return torch.randn(shape, generator=generator) * (5 / chi_squared).sqrt()


def _learns(fmt: Format) -> bool:
    """Return whether a fit minimizes the squared error by itself: if it finds levels, or several scales per block, together."""
    return any(p.shape for p in fmt.grid.params)


def _round(w: Float[torch.Tensor, "out in"], fmt: Format, ratios: Sequence[float]) -> tuple[float, int]:
    """Return the squared error and the stored bytes. The packed bytes are decoded, so a lossy layout would show."""
    params = fmt.fit(w, shrink=ratios)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    lost = packed.dequantize().sub_(w).double().square_().sum()
    return float(lost), sum(t.numel() * t.element_size() for t in packed.tensors.values())


def best_rows(measured: Mapping[str, Any], source: str) -> dict[str, Mapping[str, Any]]:
    """Return the row of every format on one source with its better clipping, in the order of stored bits."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in measured["rows"]:
        if row["source"] == source and (row["format"] not in best or row["error"] < best[row["format"]]["error"]):
            best[row["format"]] = row
    return dict(sorted(best.items(), key=lambda item: item[1]["bits_per_weight"]))
