"""Mixture: every block picks the best of a few tables of levels, and stores the choice beside its scale.

    w_hat = tables[which][code] * scale

Every table is a grid (`Levels`) that fits its own scale; the one with the smallest squared error, weighted by importance, wins (the
first of equals). All tables have codes of the same width and the same invalid codes, so the validity of a code does not depend on its
block. `which` takes log2(len(tables)) bits per block; the number of tables is a power of two, so every stored `which` is valid. A
search tries all its scales, as they will be stored, with every table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.grids.levels import Levels, search_tables
from bitpress.formats.layouts.dense import code_dtype
from bitpress.formats.scale_store import Outer, ScaleStore

__all__ = ["Mixture"]

# Weights whose errors are computed at a time: half a megabyte.
WEIGHTS_TOGETHER = 1 << 17


@dataclass(frozen=True)
class Mixture:
    name: str
    tables: tuple[Levels, ...]

    def __post_init__(self) -> None:
        if len(self.tables) not in (2, 4, 8, 16):
            raise FormatError(
                f"{self.name}: a mixture needs 2, 4, 8 or 16 tables, not {len(self.tables)}; repeat one to fill up."
            )
        if len({(table.code_bits, _unused(table)) for table in self.tables}) > 1:
            raise FormatError(f"{self.name}: the tables of a mixture must have codes of one width and the same invalid codes.")
        if len({table.usual_scale for table in self.tables}) > 1:
            raise FormatError(f"{self.name}: the tables of a mixture must have the same scale store.")

    @property
    def code_bits(self) -> int:
        return self.tables[0].code_bits

    @property
    def num_codes(self) -> int:
        return self.tables[0].num_codes

    @property
    def span(self) -> int:
        return 1

    @property
    def usual_scale(self) -> str:
        return self.tables[0].usual_scale

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"), StoredParam("which", "code", bits=(len(self.tables) - 1).bit_length()))

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the table with the smallest squared error, and its scale. A block of zeros gets scale 0 and table 0."""
        scale = torch.zeros_like(blocks[:, :1])
        which = torch.zeros_like(scale)
        smallest = torch.full_like(scale, math.inf)
        for index, table in enumerate(self.tables):
            fitted = table.fit(blocks, importance)["scale"]
            total = _errors(table, blocks, importance, fitted)
            better = total < smallest
            smallest = torch.where(better, total, smallest)
            scale = torch.where(better, fitted, scale)
            which = torch.where(better, float(index), which)
        return {"scale": scale, "which": which}

    def search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: Float[torch.Tensor, "blocks n"] | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> Params:
        """See `OwnSearch`: the best stored scale of every table, then the best table."""
        which = torch.zeros_like(blocks[:, :1])
        best, smallest = which.clone(), torch.full_like(which, math.inf)
        for index, table in enumerate(self.tables):
            own = table.search(blocks, importance, shrink, store, outer)
            tried = table.trial_scales(blocks, importance, shrink, store, outer) if own is None else [own["scale"]]
            for scale in tried:
                total = _errors(table, blocks, importance, scale)
                better = total < smallest
                best, smallest = torch.where(better, scale, best), torch.where(better, total, smallest)
                which = torch.where(better, float(index), which)
        return {"scale": best, "which": which}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        # One search for all tables: error feedback calls this for every column, where calls cost more than their work.
        middles, order, zeros = _ranked(self.tables, values.device)
        which = params["which"].long()[..., 0].expand(values.shape[:-1])
        scaled = (values / torch.where(params["scale"] == 0, 1.0, params["scale"])).contiguous()
        codes = order[which].gather(-1, torch.searchsorted(middles[which], scaled))
        if zeros is not None:
            zero, signed = (code[which][..., None] for code in zeros)
            codes = torch.where((codes == zero) & torch.signbit(scaled), signed, codes)
        return codes

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        joined = _joined(self.tables, codes.device)
        return joined[codes.int() + (params["which"].int() << self.code_bits)] * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for an invalid code; all tables have the same invalid codes."""
        self.tables[0].check(codes)


def _errors(
    table: Levels,
    blocks: Float[torch.Tensor, "blocks n"],
    importance: torch.Tensor | None,
    scale: Float[torch.Tensor, "blocks 1"],
) -> Float[torch.Tensor, "blocks 1"]:
    """Return the squared error of every block, weighted by importance."""
    together = max(WEIGHTS_TOGETHER // blocks.shape[1], 1)
    totals = []
    for start in range(0, len(blocks), together):
        here = slice(start, start + together)
        params = {"scale": scale[here]}
        error = table.decode(table.encode(blocks[here], params), params).sub_(blocks[here]).square_()
        totals.append((error if importance is None else error.mul_(importance[here])).sum(-1, keepdim=True))
    return torch.cat(totals)


def _unused(table: Levels) -> frozenset[int]:
    used = {code for code, level in enumerate(table.levels) if not math.isnan(level)}
    return frozenset(range(1 << table.code_bits)) - used


@cache
def _ranked(
    tables: tuple[Levels, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the boundaries between the levels of every table, the codes between them, and the codes of zero and negative zero.

    Tables with fewer levels are filled up with boundaries that no value reaches.
    """
    found = [search_tables(table.levels, device) for table in tables]
    most, dtype = max(len(codes) for _, codes, _ in found), code_dtype(tables[0].code_bits)
    middles = [torch.nn.functional.pad(at, (0, most - 1 - len(at)), value=math.inf) for at, _, _ in found]
    order = [torch.nn.functional.pad(codes, (0, most - len(codes))) for _, codes, _ in found]
    zeros = None
    if any(zero is not None for _, _, zero in found):
        # A table without two zeros: a code that none has.
        pairs = torch.tensor([zero or (-1, 0) for _, _, zero in found], dtype=torch.int16, device=device)
        zeros = (pairs[:, 0], pairs[:, 1].to(dtype))
    return torch.stack(middles), torch.stack(order).to(dtype), zeros


@cache
def _joined(tables: tuple[Levels, ...], device: torch.device) -> Float[torch.Tensor, " levels"]:
    """Return the levels of all tables, one table after the other, each filled up to 2^code_bits."""
    rows = [[*table.levels, *[math.nan] * ((1 << table.code_bits) - len(table.levels))] for table in tables]
    return torch.tensor(rows, dtype=torch.float32, device=device).flatten()
