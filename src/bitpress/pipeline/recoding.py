"""Codes anew: the recipe's quantizer on a weight whose input's basis was learned."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.formats import Format
from bitpress.pipeline.compose import compress_placed, needed_of
from bitpress.quantizers.quantizer import Outcome
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod
from bitpress.transforms.basis import Maps
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats
from bitpress.tuning.learned_maps import MapTuning, Recode

__all__ = ["find_recode"]

# Statistics that are known of a layer in any basis of its input and whatever its outputs are divided by.
KNOWN = frozenset({"gram", "cross", "attention_gram", "loss_gram"})


@dataclass(frozen=True)
class _Given:
    """The change of basis by maps that are there already."""

    maps: Maps

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {}
    summary: ClassVar[str] = "maps that are there already"
    paper: ClassVar[str] = ""

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        return self.maps


def find_recode(tuning: MapTuning, method: LayerMethod, stats: Stats | None) -> tuple[Recode | None, str | None]:
    """Return what chooses a weight's stored codes in a learned basis, None for rounding to nearest; and why, where the recipe wants another.

    `stats` are those of the layer's input before that basis.
    """
    quantizer = method.quantizer.part
    if tuning.codes == "nearest" or isinstance(quantizer, RTN):
        return None, None
    needs = quantizer.needs.union(*(target.needs for target in method.targets))
    unknown = [] if stats is None else sorted(n for n in needs - KNOWN if stats.found(n) is not None)
    if unknown:
        return None, f"rounds to nearest: {method.quantizer.name} needs {unknown[0]}, which is not known behind a learned map"

    def recode(w: torch.Tensor, maps: Maps, columns: torch.Tensor | None) -> Outcome:
        seen = needed_of(stats, needs)
        if seen is not None and columns is not None:
            seen = seen.rescaled(1 / columns)
        try:
            return compress_placed(w, seen, replace(method, changes=(_Given(maps),), corrections=()))
        except (CalibrationError, FormatError) as error:
            raise NumericsError(str(error)) from error

    return recode, None
