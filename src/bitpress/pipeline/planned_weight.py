"""A weight with its parts, planned before any work is done."""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.formats import AnyFormat, Format
from bitpress.recipes import LayerMethod

__all__ = ["PlannedWeight", "place_in_block"]


@dataclass(frozen=True)
class PlannedWeight:
    """A weight with its parts; `nbytes` counts the terms of the quantizer and of the corrections (maps are not counted)."""

    parameter: WeightParameter
    method: LayerMethod
    block: int

    @property
    def format(self) -> AnyFormat:
        return self.method.format

    @cached_property
    def nbytes(self) -> int:
        shape, parts, fmt = self.parameter.shape, max(self.parameter.experts, 1), self.format
        own = (
            self.method.quantizer.part.stored_bytes(fmt, shape, parts)
            if isinstance(fmt, Format)
            else fmt.nbytes(self.parameter.stacked_shape)
        )
        return own + sum(part.nbytes(shape, parts) for part in self.method.corrections)

    @property
    def weights(self) -> int:
        return math.prod(self.parameter.stacked_shape)

    @property
    def under_settings(self) -> list["PlannedWeight"]:
        """Return the weight as it would be under every setting that its layer may choose."""
        return [replace(self, method=self.method.under(setting)) for setting in self.method.settings]

    def row(self) -> dict[str, object]:
        return {
            "name": self.parameter.stem,
            "shape": list(self.parameter.parameter_shape),
            "format": self.format.name,
            "bytes": self.nbytes,
            "bits_per_weight": self.nbytes * 8 / self.weights,
            **({} if self.method.inputs is None else {"inputs": self.method.inputs.name}),
            **({} if not self.method.settings else {"settings": [setting.name for setting in self.method.settings]}),
        }


def place_in_block(name: str) -> str:
    """Return the place of a weight in its block: `model.layers.3.mlp.experts.7.up_proj` -> `mlp.experts.N.up_proj`."""
    _, _, inside = re.sub(r"\.\d+(?=\.|$)", ".N", name).partition(".N.")
    return inside or name
