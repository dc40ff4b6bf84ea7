"""Records of a run: the entries of the journal and the report for every compressed weight, checked when they are made and when they are read."""

import math
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import CheckpointError
from bitpress.report.document import LayerRow, TokenErrors, TunedSpan

__all__ = ["BlockRecord", "LayerRow", "TokenErrors", "TunedSpan"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockRecord(_Closed):
    """The journal's entry for a unit of work, by the names of parameters: how weights are stored, hashes of their decoded values, rows.

    `attention` specifies the operands of attention by the names of modules, and is left out where they are as they were.
    `kept` are hashes of tensors that were measured before the first block, in the first unit's record.
    """

    weights: dict[str, WeightRecord] = {}
    digests: dict[str, str] = {}
    rows: list[LayerRow] = []
    tuned: list[TunedSpan] = []
    kept: dict[str, str] | None = None
    attention: dict[str, dict[str, dict[str, str]]] = {}

    @classmethod
    def read(cls, where: str, facts: object) -> "BlockRecord":
        """Read a record of a journal. Raises CheckpointError."""
        try:
            return cls.model_validate(facts)
        except ValidationError as error:
            raise CheckpointError(f"{where}: does not describe compressed weights; start again with --force.") from error

    @classmethod
    def merge(cls, records: Iterable["BlockRecord"]) -> "BlockRecord":
        """Put the records of all units together."""
        weights: dict[str, WeightRecord] = {}
        digests: dict[str, str] = {}
        rows: list[LayerRow] = []
        attention: dict[str, dict[str, dict[str, str]]] = {}
        tuned: list[TunedSpan] = []
        for record in records:
            weights |= record.weights
            digests |= record.digests
            rows += record.rows
            attention |= record.attention
            tuned += record.tuned
        return cls(weights=weights, digests=digests, rows=rows, attention=attention, tuned=tuned)

    def dump(self) -> dict[str, Any]:
        """Return the record as the journal holds it."""
        values = self.model_dump(mode="json")
        absent = {key for key in ("kept", "tuned", "attention") if not values[key]}
        return {key: value for key, value in values.items() if key not in absent}

    @property
    def error(self) -> float:
        """Mean relative error of the weights."""
        return math.fsum(row.error for row in self.rows) / max(len(self.rows), 1)
