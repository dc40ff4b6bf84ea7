"""Codes anew: the recipe's quantizer on a weight whose input's basis was learned."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.formats import Format
from bitpress.pipeline.compose import compress_placed, needed_of
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod
from bitpress.transforms.basis import Maps
from bitpress.transforms.sites import Sites
from bitpress.transforms.target import TargetStats
from bitpress.transforms.transform import InputStats
from bitpress.tuning.learned_maps import Clip, MapTuning, Recode, Recoded

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


@dataclass(frozen=True)
class _Clipped:
    """The change of target that learned ends of ranges are."""

    clip: Clip

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {}
    summary: ClassVar[str] = "ranges of blocks as they were learned"
    paper: ClassVar[str] = ""

    def aim(
        self, w: Float[torch.Tensor, "out in"], stats: TargetStats | None
    ) -> tuple[Float[torch.Tensor, "out in"], tuple[str, ...]]:
        return self.clip(w), ()


def find_recode(tuning: MapTuning, method: LayerMethod, fmt: Format, stats: Stats | None) -> tuple[Recode | None, str | None]:
    """Return what chooses a weight's stored codes in a learned basis, None for rounding to nearest; and why, where the recipe wants another.

    `fmt` is that of its codes, `stats` are those of the layer's input before that basis.
    """
    quantizer = method.quantizer.part
    if tuning.codes == "nearest" or (isinstance(quantizer, RTN) and not method.targets):
        return None, None
    needs = quantizer.needs.union(*(target.needs for target in method.targets))
    unknown = [] if stats is None else sorted(n for n in needs - KNOWN if stats.found(n) is not None)
    if unknown:
        return None, f"rounds to nearest: {method.quantizer.name} needs {unknown[0]}, which is not known behind a learned map"
    if quantizer.keeps_map or not quantizer.keeps_format:
        what = "a map of its own" if quantizer.keeps_map else "other formats"
        return None, f"rounds to nearest: {method.quantizer.name} makes {what} for a weight, with these settings"
    seen = needed_of(stats, needs)

    def recode(w: torch.Tensor, maps: Maps, columns: torch.Tensor | None, clip: Clip | None) -> Recoded:
        targets = method.targets if clip is None else (*method.targets, _Clipped(clip))
        parts = replace(method, format=fmt, changes=(_Given(maps),), targets=targets, corrections=())
        try:
            made = compress_placed(w, seen if seen is None or columns is None else seen.rescaled(1 / columns), parts)
        except (CalibrationError, FormatError) as error:
            raise NumericsError(str(error)) from error
        return made.weight, made.fallbacks

    return recode, None
