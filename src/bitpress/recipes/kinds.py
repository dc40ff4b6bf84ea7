"""The kinds of parts that a recipe names: the one table that building a method, reading a recipe and its errors are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitpress.allocation.choices import CHOICES
from bitpress.calibration.observers import OBSERVERS
from bitpress.corrections.table import BIAS_CORRECTIONS, CORRECTIONS, OFFSET_CORRECTIONS
from bitpress.quantizers.table import QUANTIZERS
from bitpress.transforms.table import (
    ATTENTION_CHANGES,
    BASIS_CHANGES,
    CHANNEL_CHANGES,
    NETWORK_CHANGES,
    SCALE_SEARCHES,
    TARGETS,
)
from bitpress.tuning.table import TUNINGS

__all__ = ["KINDS", "LISTS", "Kind", "Table", "table_of"]

# Parts by name; the parts of one key have protocols of their own.
Table = Mapping[str, type[Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of part: the key of a recipe that names such parts, what errors call one, and its table."""

    key: str
    noun: str
    table: Table


# By the kind's name, in the order in which parts act on a weight.
KINDS: dict[str, Kind] = {
    "network": Kind("transforms", "transform", NETWORK_CHANGES),
    "attention": Kind("transforms", "transform", ATTENTION_CHANGES),
    "channels": Kind("transforms", "transform", CHANNEL_CHANGES),
    "search": Kind("transforms", "transform", SCALE_SEARCHES),
    "basis": Kind("transforms", "transform", BASIS_CHANGES),
    "target": Kind("transforms", "transform", TARGETS),
    "correction": Kind("corrections", "correction", CORRECTIONS),
    "bias": Kind("corrections", "correction", BIAS_CORRECTIONS),
    "offset": Kind("corrections", "correction", OFFSET_CORRECTIONS),
    "quantizer": Kind("quantizer", "quantizer", QUANTIZERS),
    "tuning": Kind("tuning", "tuning", TUNINGS),
    "observer": Kind("observer", "observer", OBSERVERS),
    "choice": Kind("choose", "choice", CHOICES),
}

# Keys of a recipe that list parts; `quantizer` names a single one, and so do `observer` below `inputs` and `by` below `choose`.
LISTS = tuple(dict.fromkeys(kind.key for kind in KINDS.values() if kind.key not in ("quantizer", "observer", "choose")))


def table_of(key: str) -> Table:
    """Return every part that a key of a recipe can name."""
    return {name: made for kind in KINDS.values() if kind.key == key for name, made in kind.table.items()}
