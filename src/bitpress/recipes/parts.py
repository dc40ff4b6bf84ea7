"""The parts of a recipe made from their names and settings: quantizers, transforms, corrections."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bitpress.errors import FormatError, UsageError, fold, unknown_name
from bitpress.faults import value_fault
from bitpress.foreign import foreign_hint
from bitpress.formats import read_format
from bitpress.recipes.kinds import KINDS, Table, table_of

__all__ = ["make_part", "settings_of", "spelled"]


def spelled(name: str, table: Mapping[str, Any]) -> str:
    """Return a name as the table spells it: QuIP-Sharp is quip_sharp, AWQ_scale is awq-scale; one that is not there as it is."""
    return next((known for known in table if fold(known) == fold(name)), name)


def make_part(kind: str, part: Mapping[str, Any], table: Table) -> Any:
    """Make a part of a recipe from its name and settings. Raises UsageError that says which of them is wrong."""
    name = part.get("name")
    if not isinstance(name, str) or name not in table:
        raise _unknown_part(kind, str(name), table)
    rest = {key: value for key, value in part.items() if key != "name"}
    fields = {field.name for field in dataclasses.fields(table[name])}
    for key in rest:
        if key not in fields:
            raise unknown_name(f"setting of {kind} {name!r}", str(key), fields)
    try:
        return TypeAdapter(table[name]).validate_python(rest)
    except ValidationError as error:
        at, wrong = value_fault(error)
        raise UsageError(f"{': '.join([f'{kind} {name}', *map(str, at)])}: {wrong}") from error


def _unknown_part(kind: str, name: str, table: Mapping[str, Any]) -> UsageError:
    """Make the error for a method's name: it may be one of another kind, or another tool's."""
    for other, key in {made.noun: made.key for made in KINDS.values()}.items():
        names = table_of(key)
        if other != kind and spelled(name, names) in names:
            return UsageError(
                f"unknown {kind} {name!r}: that is a {other}; it goes under {key} (`bitpress methods` lists all)."
            )
    hint = foreign_hint(name)
    if hint is None and name.strip():
        try:
            hint = f"That is a number format: weights {read_format(name).name}."
        except (UsageError, FormatError):
            hint = None
    return unknown_name(kind, name, () if hint else table, hint, "bitpress methods")


def settings_of(part: Any) -> dict[str, Any]:
    """Return every setting of a part with its value, but for those that are None and that recipes of before do not have."""
    later = {field.name for field in dataclasses.fields(part) if field.metadata.get("later")}
    return {name: value for name, value in dataclasses.asdict(part).items() if value is not None or name not in later}
