"""What every quantizer is: hyper-parameters in the constructor, one weight with its statistics in the verb.

A quantizer is pure: no model, no files, no randomness that is not seeded by its own fields.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import FormatError
from bitpress.formats import CompressedWeight, Format

__all__ = ["LOOSE", "Outcome", "Quantizer", "check_served", "is_served", "output_error", "output_errors"]

# Of the squared error of rounding to nearest, for a method that does not lessen it. A weight at a fraction f between two levels a step
# apart costs f (1 - f) of the step's square on average where it goes up with probability f: a mean of 1/6, twice that of the nearest
# level, 1/12. As much again is left for unequal steps and for chance.
LOOSE = 4.0


@dataclass(frozen=True)
class Outcome:
    """A compressed weight, and what is worth telling of how it came about."""

    weight: CompressedWeight
    fallbacks: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)


class Quantizer(Protocol):
    """One paper's way to choose codes. A quantizer inherits this protocol and its defaults.

    needs          names from `calibration.stats.STATISTICS`
    transforms     the transforms that the paper puts before it, by name or as in a recipe with their settings; a recipe may say otherwise
    paper          row of the paper in the catalogue of methods, or what it is a yardstick of
    bits           the least and the most bits of the codes, a weight, that it is meant for
    serves         patterns of the names of formats that it can choose codes for; one that begins with "!" names exceptions
    least_squares  whether it lowers the squared error of the layer's output (of the weight, where it needs no statistics), so that
                   it is never worse than rounding to nearest. One with other aims (stochastic rounding, which is right on average)
                   says False, and may be up to `LOOSE` times as far away

    native_loops   whether it goes through columns one after the other, which native code does on the host faster than a GPU: where both are
                   there, its weights are quantized on the host

    `tests/laws/test_quantizers.py` holds every row of the table to these declarations.
    """

    needs: ClassVar[frozenset[str]]
    transforms: ClassVar[tuple[Any, ...]]  # names and mappings; a protocol's attributes are invariant
    summary: ClassVar[str]
    paper: ClassVar[str]
    bits: ClassVar[tuple[float, float]]
    serves: ClassVar[tuple[str, ...]] = ("*",)
    least_squares: ClassVar[bool] = True
    native_loops: ClassVar[bool] = False

    @property
    def keeps_map(self) -> bool:
        """Whether its weights have a map of their own; then every one of them has."""
        return False

    @property
    def keeps_format(self) -> bool:
        """Whether its codes are in the format that it is given, rather than in one that it derives from it weight by weight."""
        return True

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        """Return the bytes of the terms that it makes in a format, for `parts` stacked weights of a shape [out, in].

        Exact where settings and shapes decide it; where the weights do, what the settings aim at. Maps are not counted. Raises
        FormatError and UsageError for terms that the shape does not have.
        """
        return fmt.nbytes((shape[0] * parts, shape[1]))

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        """Compress a weight. `stats` holds what `needs` asks for. Raises FormatError, CalibrationError, NumericsError."""
        ...


def is_served(serves: Sequence[str], fmt: Format) -> bool:
    """Return whether a pattern of `serves` is the name of the format, and none of its exceptions is."""
    exceptions = any(fnmatch.fnmatchcase(fmt.name, pattern[1:]) for pattern in serves if pattern.startswith("!"))
    return not exceptions and any(fnmatch.fnmatchcase(fmt.name, pattern) for pattern in serves)


def check_served(method: str, serves: Sequence[str], fmt: Format) -> None:
    """Raise FormatError unless the method serves the format."""
    if not is_served(serves, fmt):
        raise FormatError(f"{method} serves {', '.join(serves).replace(', !', ', not ')}, not {fmt.name}.")


def output_error(w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], stats: Stats | None) -> float:
    """Return the relative squared error of the layer's output, or of its weight where there is no gram.

    sum((w - w_hat) gram (w - w_hat)') / sum(w gram w')
    """
    return output_errors(w, (w_hat,), stats)[0]


def output_errors(
    w: Float[torch.Tensor, "out in"], candidates: Sequence[Float[torch.Tensor, "out in"]], stats: Stats | None
) -> list[float]:
    """Return `output_error` of several candidates; what they share is computed once. Always finite."""
    gram = None if stats is None else stats.gram
    whole = _energy(w, gram)
    found = [_energy(w - w_hat, gram) for w_hat in candidates]
    if not all(map(math.isfinite, (whole, *found))) or whole < torch.finfo(torch.float32).tiny:
        # Squares out of the range of float32: the same in float64, and beside the largest weight.
        size = w.abs().max().double()
        size = size if float(size) else size + 1
        wide = None if gram is None or not bool(torch.isfinite(gram).all()) else gram.double()
        whole = _energy(w.double() / size, wide)
        found = [_energy((w.double() - w_hat.double()) / size, wide) for w_hat in candidates]
    return [error / whole if whole > 0 else 0.0 for error in found]


def _energy(w: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"] | None) -> float:
    return float(w.square().sum() if gram is None else (w @ gram).mul_(w).sum())
