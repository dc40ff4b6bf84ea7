"""A built part of a recipe beside its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bitpress.recipes.kinds import KINDS, table_of
from bitpress.recipes.parts import make_part, settings_of

__all__ = ["Named", "named_part", "part_of_key"]

P = TypeVar("P", bound=Any, covariant=True)


@dataclass(frozen=True)
class Named(Generic[P]):
    """A part with its name in the table of its kind; `usual`: bitpress chose it, where the user named none."""

    kind: str
    name: str
    part: P
    usual: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the part as a recipe spells it, with every setting."""
        return {"name": self.name, **settings_of(self.part)}


def part_of_key(key: str, part: Mapping[str, Any]) -> Named[Any]:
    """Build a part that a key of the recipe names: the first kind whose table has the name."""
    kinds = [name for name, kind in KINDS.items() if kind.key == key]
    kind = next((name for name in kinds if part.get("name") in KINDS[name].table), None)
    if kind is None:
        make_part(KINDS[kinds[0]].noun, part, table_of(key))  # raises for the name
        raise AssertionError
    return named_part(kind, part)


def named_part(kind: str, part: Mapping[str, Any]) -> Named[Any]:
    """Build a part of a kind from its name and settings. Raises UsageError that says which of them is wrong."""
    return Named(kind, str(part.get("name")), make_part(KINDS[kind].noun, part, KINDS[kind].table))
