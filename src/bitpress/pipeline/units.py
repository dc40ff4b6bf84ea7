"""Units of work: what a job commits, and its lines in the journal.

Units that are committed together happen all or not at all: a line that says "joined" counts with the next one only. A unit that replaces an
earlier one (`replaces`) has a file of another name, or the same file with other facts, and stands in its place from then on.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from bitpress.checkpoints.directory import check_file_name
from bitpress.checkpoints.jsonfile import parse_json
from bitpress.errors import CheckpointError

__all__ = ["After", "Unit", "Work", "add_", "line_of", "read_unit"]


class After(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    file: str
    sha256: str


class Unit(BaseModel):
    """A finished unit of work, as a line of the journal holds it; `facts` are the job's own record of it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unit: str
    shard: str
    bytes: int
    sha256: str
    facts: dict[str, Any]
    after: After | None
    joined: bool = False
    replaces: bool = False


@dataclass(frozen=True)
class Work:
    """A unit to commit: its name, the name of its file, and what is in it. Without tensors the file stays that of the unit it replaces."""

    unit: str
    shard: str
    tensors: Mapping[str, torch.Tensor] | None
    facts: Mapping[str, Any]


def line_of(unit: Unit) -> bytes:
    """Return a unit as a line of the journal."""
    values = {key: value for key, value in unit.model_dump().items() if value or key not in ("joined", "replaces")}
    payload = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return b"%08x " % zlib.crc32(payload) + payload + b"\n"


def add_(units: list[Unit], unit: Unit) -> None:
    """Add a unit to those that are done, or put it in the place of the one that it replaces."""
    at = next((k for k, known in enumerate(units) if known.unit == unit.unit), None) if unit.replaces else None
    if unit.replaces and at is None:
        raise CheckpointError(f"the journal replaces {unit.unit}, which it does not hold; start again with --force.")
    if at is None:
        units.append(unit)
    else:
        units[at] = unit.model_copy(update={"after": units[at].after})


def read_unit(where: str, payload: bytes) -> Unit:
    """Read a line of the journal; its names become paths, so they are checked like those of any other file."""
    values = parse_json(payload, where)
    try:
        unit = Unit.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{where}: is not a unit of work; start again with --force.") from error
    for name in (unit.shard, unit.after.file if unit.after else unit.shard):
        check_file_name(where, name)
    return unit
