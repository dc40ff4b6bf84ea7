"""How inputs of products and operands of attention are rounded, built from what a recipe says."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bitpress.calibration.observers import Observer, Seen, static_format
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import ActivationFormat, ChannelFormat, Format, InputFormat, find_format
from bitpress.formats.activation import ParameterSource
from bitpress.formats.attention import check_probabilities
from bitpress.recipes.named import Named, named_part
from bitpress.recipes.recipe import DEFAULT_OBSERVER, InputRounding

__all__ = ["InputMethod", "input_method", "operand_method"]


@dataclass(frozen=True)
class InputMethod:
    """How the input of a product is rounded; `observer` chooses stored parameters, and is None where they are dynamic."""

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

    def made(self, seen: Seen | None, where: str) -> ActivationFormat:
        """Return the format with the stored parameters that its observer chooses by what was seen; `where` stands in errors.

        Raises CalibrationError, NumericsError.
        """
        if self.observer is None or seen is None:
            return ActivationFormat(self.format)
        try:
            return static_format(self.format, self.observer.part.choose(seen, self.format))
        except BitpressError as error:
            raise type(error)(f"{where}: {error}") from error

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


def operand_method(name: str, said: InputRounding) -> InputMethod:
    """Build how an operand of attention is rounded. Raises FormatError, UsageError."""
    made = _whole(said)
    looks_at = None if made.observer is None else made.observer.part.looks_at
    if looks_at == "product" or (looks_at == "tokens" and name == "probabilities"):
        assert made.observer is not None
        raise UsageError(f"{name}: {made.observer.name} looks at inputs of linear layers; use minmax or mse.")
    if name == "probabilities":
        check_probabilities(made.format)
    return made


def input_method(said: InputRounding) -> InputMethod:
    """Build how an input is rounded, its first channels otherwise where that is said. Raises FormatError, UsageError."""
    made = _whole(said)
    if said.first is None:
        return made
    fmt = find_format(said.first.format)
    if not isinstance(fmt, Format):
        raise FormatError(f"{fmt.name} keeps numbers bit for bit; the first channels of inputs need a format that rounds.")
    ChannelFormat(ActivationFormat(made.format, made.parameters), ActivationFormat(fmt), 1)  # raises
    return replace(made, first=(said.first.share, fmt))


def _whole(said: InputRounding) -> InputMethod:
    """Build how an input is rounded. Raises FormatError for a format that inputs cannot have, UsageError."""
    fmt = find_format(said.format)
    if not isinstance(fmt, Format):
        raise FormatError(f"{fmt.name} keeps numbers bit for bit; inputs that are to stay as they are need no format.")
    if said.parameters == "dynamic":
        if said.observer is not None:
            raise UsageError("an observer chooses static parameters, and these are dynamic; leave out one of them.")
        ActivationFormat(fmt)  # raises
        return InputMethod(fmt, "dynamic")
    ActivationFormat(fmt, said.parameters)
    observer: Named[Observer] = named_part("observer", {"name": DEFAULT_OBSERVER, **(said.observer or {})})
    if said.parameters == "local" and not observer.part.local:
        raise UsageError(
            f"{observer.name} compares the codes of one range, and local parameters have one for every group; use mse."
        )
    return InputMethod(fmt, said.parameters, observer)
