"""A part of a recipe with its name, and how the input of a product is rounded."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from bitpress.calibration.observers import Observer
from bitpress.formats import ActivationFormat, ChannelFormat, Format, InputFormat
from bitpress.formats.activation import ParameterSource
from bitpress.recipes.parts import settings_of

__all__ = ["InputMethod", "Named"]

P = TypeVar("P", bound=Any, covariant=True)


@dataclass(frozen=True)
class Named(Generic[P]):
    """A part with its name in the table of its kind."""

    kind: str
    name: str
    part: P

    def settings(self) -> dict[str, Any]:
        """Return the part as a recipe spells it, with every setting."""
        return {"name": self.name, **settings_of(self.part)}


@dataclass(frozen=True)
class InputMethod:
    """How the input of a product is rounded; `observer` chooses static parameters, and is None where they are dynamic."""

    format: Format
    parameters: ParameterSource
    observer: Named[Observer] | None = None
    first: tuple[float, Format] | None = None

    @property
    def name(self) -> str:
        more = "" if self.first is None else f", first {self.first[0]:g} of the channels {self.first[1].name}"
        return f"{self.format.name} {self.parameters}{more}"

    def channels_spec(self) -> dict[str, str]:
        """Return the keys that a layer's record will have of it, as far as a recipe says."""
        first = {} if self.first is None else {"first": self.first[1].name}
        return {"format": self.format.name, "parameters": self.parameters, **first}

    def channels(
        self, rest: ActivationFormat, width: int, shift: Tensor | None = None, copies: Tensor | None = None
    ) -> InputFormat:
        """Return the format of an input of a width whose channels are rounded as `rest` but for the first ones."""
        if self.first is None and shift is None and copies is None:
            return rest
        share, fmt = self.first or (0.0, None)
        first = None if fmt is None else ActivationFormat(fmt)
        return ChannelFormat(rest, first, int(share * width), shift, copies)

    def spec(self) -> dict[str, Any]:
        """Return what a recipe says of it."""
        own = {} if self.observer is None else {"observer": self.observer.settings()}
        first = {} if self.first is None else {"first": {"share": self.first[0], "format": self.first[1].name}}
        return {"format": self.format.name, "parameters": self.parameters, **own, **first}
