"""The formats among which a budget of bits chooses: those that it names, or the widths of the recipe's own format."""

import re
from collections.abc import Sequence

from bitpress.errors import FormatError, UsageError
from bitpress.formats import GRIDS, AnyFormat, Format, find_format, parse_format
from bitpress.quantizers.quantizer import check_served, is_served
from bitpress.recipes.recipe import Budget

__all__ = ["find_options"]

WIDTHS = (2, 3, 4, 5, 6, 8)


def find_options(budget: Budget, fmt: AnyFormat, quantizer: str, serves: Sequence[str]) -> tuple[Format, ...]:
    """Return the formats of a budget, `fmt` among them. Raises UsageError where there are fewer than two, FormatError for a wrong name.

    `fmt` is the recipe's own; `quantizer` is the name of its quantizer, which serves formats by these patterns.
    """
    if budget.among is None:
        if isinstance(fmt, Format):
            check_served(quantizer, serves, fmt)
        found = [] if not isinstance(fmt, Format) else _widths_of(fmt, serves)
        if len(found) < 2:
            raise UsageError(
                f"budget: {fmt.name} has no other widths to choose among; name the formats, for example "
                f"budget: {{bits: {budget.bits:g}, among: [int2-g64-zero, int3-g64-zero, int4-g64-zero]}}."
            )
        return tuple(found)
    named = {name: find_format(name) for name in budget.among}
    options = list(dict.fromkeys(option for option in named.values() if isinstance(option, Format)))
    if exact := [name for name, option in named.items() if not isinstance(option, Format)]:
        raise UsageError(f"budget: {exact[0]} keeps weights bit for bit and has no width to choose; leave it out of among.")
    if len(options) < 2:
        raise UsageError("budget: among names fewer than two formats, so there is nothing to choose; name more.")
    if fmt not in options:
        told = ", ".join(option.name for option in options)
        raise UsageError(f"budget: weights {fmt.name} is not among {told}; add it there, or leave weights out.")
    return tuple(options)


def _widths_of(fmt: Format, serves: Sequence[str]) -> list[Format]:
    """Return a format with the number in its grid's name replaced, where that is its width: gauss6x2-row is also gauss4x2-row, gauss8x2-row."""
    grid, *rest = fmt.name.split("-")
    family = re.fullmatch(r"([a-z]+)(\d+)((?:x\d+|[a-z]+)?)", grid)
    own = fmt.code_bits_per_weight
    if family is None or int(family[2]) != own * fmt.grid.span:
        return []
    found = []
    for width in sorted({*WIDTHS, int(own)} if own == int(own) else WIDTHS):
        name = f"{family[1]}{width * fmt.grid.span}{family[3]}"
        if name in GRIDS:
            try:
                option = parse_format("-".join([name, *rest]))
            except FormatError:  # a layout, or a zero point, that this width does not have
                continue
            alike = option.grid.span == fmt.grid.span and option.code_bits_per_weight == width
            if alike and is_served(serves, option):
                found.append(option)
    return found
