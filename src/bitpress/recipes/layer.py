"""The parts for one weight, and the settings that a recipe lets each layer choose among."""

from dataclasses import dataclass, replace
from typing import Any

from bitpress.corrections.correction import Correction
from bitpress.errors import UsageError
from bitpress.formats import AnyFormat, Format, find_format
from bitpress.quantizers.quantizer import Quantizer
from bitpress.recipes.inputs import InputMethod, input_method
from bitpress.recipes.named import Named
from bitpress.recipes.recipe import Choose, LayerSetting
from bitpress.transforms.basis import BasisChange
from bitpress.transforms.target import Target

__all__ = ["LayerMethod", "Setting", "build_settings"]


@dataclass(frozen=True)
class Setting:
    """What a layer may have: a format of its weight, a way to round its input, and whether channel scales reach it.

    said      as the recipe says it
    format    None: the recipe's
    inputs    of no meaning unless `said.inputs` is there: then None leaves the input as it is
    """

    said: LayerSetting
    format: Format | None
    inputs: InputMethod | None

    @property
    def name(self) -> str:
        """Words for a report: `e1m2-row, inputs e2m1-tensor static`."""
        parts = [] if self.format is None else [self.format.name]
        if self.said.inputs is not None:
            parts.append("inputs kept" if self.inputs is None else f"inputs {self.inputs.name}")
        return ", ".join([*parts, *["no channel scales"] * (not self.said.scales)]) or "the recipe's own"

    def spec(self) -> dict[str, Any]:
        """Return what a recipe says of it."""
        values: dict[str, Any] = {} if self.format is None else {"weights": self.format.name}
        if self.said.inputs is not None:
            values["inputs"] = "keep" if self.inputs is None else self.inputs.spec()
        return {**values, "scales": self.said.scales}


@dataclass(frozen=True)
class LayerMethod:
    """The parts for one weight: everything that `compress_matrix` needs beside the weight and its statistics.

    settings   what the layer chooses among on the calibration text; empty where nothing is left to choose
    """

    format: AnyFormat
    quantizer: Named[Quantizer]
    changes: tuple[BasisChange, ...] = ()
    targets: tuple[Target, ...] = ()
    corrections: tuple[Correction, ...] = ()
    inputs: InputMethod | None = None
    settings: tuple[Setting, ...] = ()

    def under(self, setting: Setting) -> "LayerMethod":
        """Return the parts of a layer that has chosen."""
        inputs = self.inputs if setting.said.inputs is None else setting.inputs
        return replace(self, format=setting.format or self.format, inputs=inputs, settings=())

    @property
    def every_input(self) -> list[InputMethod]:
        """Return all ways in which the input may be rounded."""
        of_all = [self.inputs, *(self.under(setting).inputs for setting in self.settings)]
        return [inputs for inputs in of_all if inputs is not None]


def build_settings(choose: Choose | None) -> tuple[Setting, ...]:
    """Build what layers choose among. Raises FormatError, UsageError."""
    return () if choose is None else tuple(_setting(said) for said in choose.among)


def _setting(said: LayerSetting) -> Setting:
    fmt = None if said.weights is None else find_format(said.weights)
    if fmt is not None and not isinstance(fmt, Format):
        raise UsageError(f"choose: {fmt.name} keeps weights bit for bit; list formats that round.")
    inputs = None if said.inputs is None or said.inputs == "keep" else input_method(said.inputs)
    return Setting(said, fmt, inputs)
