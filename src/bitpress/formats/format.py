"""A number format: a grid, the block that shares its parameters, the scale store and the layout of the codes.

Parameters are tensors `[block rows, block cols, *shape]`, or `shape` for those of the whole weight. `fit` returns them rounded to the
values that the file will hold, so `encode` and a reader use the same numbers. Values that many scales share are under `<name>_<part>`;
only `Packed` reads those.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError, NumericsError, unknown_name
from bitpress.finite import all_finite
from bitpress.formats.block import Block
from bitpress.formats.grids.grid import Grid, OwnSearch, Params, SharedParams, StoredParam, Streamed
from bitpress.formats.layouts.dense import row_bytes
from bitpress.formats.layouts.table import LAYOUTS, Layout
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scale_store import ScaleStore, first_trials, shared_name
from bitpress.formats.scales import SCALES

__all__ = ["Format"]

SEARCHED_TOGETHER = 1 << 17  # weights that a clipping search handles at a time: half a megabyte
Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    grid: Grid
    block: Block
    scale: str = ""
    layout: str = "dense"

    def __post_init__(self) -> None:
        if not self.scale:
            object.__setattr__(self, "scale", self.grid.usual_scale)
        if self.scale not in SCALES:
            raise unknown_name("scale type", self.scale, SCALES)
        if self.scale != self.grid.usual_scale and not any(p.kind == "scale" for p in self.grid.params):
            raise FormatError(f"{self.grid.name} has no scales; leave out {self.scale}.")
        if self.layout not in LAYOUTS:
            raise unknown_name("layout", self.layout, LAYOUTS)
        if (reason := self.codes_layout.refuses(self.grid.code_bits, self.grid.num_codes)) is not None:
            raise FormatError(f"{self.name}: {reason}.")

    @property
    def name(self) -> str:
        """The canonical name, `int4-g64-zero`; `parse_format(name)` returns this format."""
        scale = "" if self.scale == self.grid.usual_scale else self.scale
        layout = "" if self.layout == "dense" else self.layout
        return "-".join(part for part in (self.grid.name, self.block.name, self.variant, scale, layout) if part)

    @property
    def variant(self) -> str:
        """The grid's variant as the name says it: `zero`, `zerofp16` or `zerofp32`, a zero point as a code or a float, `min`, or "" without."""
        said = (p for p in self.grid.params if p.name in ("zero", "min"))
        return next((p.name + (p.value_name if p.kind == "value" else "") for p in said), "")

    @property
    def store(self) -> ScaleStore:
        return SCALES[self.scale]

    @property
    def codes_layout(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def rows_apart(self) -> bool:
        """Whether rows of blocks share no parameters, so that a weight can be cut and joined between them."""
        shared = any(p.scope == "tensor" for p in self.grid.params) or self.store.shared_by_rows()
        return self.block.rows != "all" and not shared and not isinstance(self.grid, Streamed)

    @property
    def rows_per_code(self) -> int:
        """Weights of a column for each code: 1 except for some streams."""
        return self.grid.rows_per_code if isinstance(self.grid, Streamed) else 1

    @property
    def code_bits_per_weight(self) -> float:
        """Bits of the codes for each weight, without parameters."""
        return self.grid.code_bits / (self.grid.span * self.rows_per_code)

    def block_grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the number of blocks of a weight `[out, in]` along each axis. Raises FormatError if they do not fit."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        if shape[0] % self.rows_per_code:
            told = f"{self.rows_per_code} rows of a code of {self.grid.name}"
            raise FormatError(f"out_features={shape[0]} is not a multiple of the {told}.")
        return shape[0] // rows, shape[1] // cols

    def whole_runs(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return `block_grid`, of a weight whose rows hold whole runs of scales. Raises FormatError for another."""
        grid = self.block_grid(shape)
        if isinstance(self.store, RunCodes):
            self.store.check(self.name, shape[1], grid[1])
        return grid

    def expected(self, shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that a packed weight of this shape stores. Raises FormatError for one that does not fit."""
        down, across = self.whole_runs(shape)
        codes = self.codes_layout.row_bytes(shape[1] // self.grid.span, self.grid.code_bits)
        tensors: Expected = {"codes": (torch.uint8, (shape[0] // self.rows_per_code, codes))}
        for p in self.grid.params:
            if p.kind == "code":
                tensors[p.name] = (torch.uint8, (down, row_bytes(across, p.bits)))
            elif p.kind == "value":
                tensors[p.name] = (p.value_type, p.shape if p.scope == "tensor" else (down, across, *p.shape))
            else:
                for part, entry in self.store.expected(down, across * math.prod(p.shape)).items():
                    tensors[shared_name(p.name, part)] = entry
        return tensors

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a weight of this shape, parameters included."""
        return sum(dtype.itemsize * math.prod(dims) for dtype, dims in self.expected(shape).values())

    def fit(
        self,
        w: Float[torch.Tensor, "out in"],
        importance: Float[torch.Tensor, "*rows in"] | None = None,
        shrink: Sequence[float] = (1.0,),
        shared: Params | None = None,
    ) -> Params:
        """Choose parameters for every block.

        Every ratio in `shrink` is tried as a factor on the block's range; the one with the smallest squared error (weighted by
        `importance`, per input or per weight) wins. (1.0,) is plain min-max. Where a coarse store would change the full range, the
        stored scales on both sides of it are tried likewise, and by a search also those beside a scale that is stored exactly.
        `shared` are parameters of an earlier fit of this weight; the parts that many blocks share (codebooks, scales of scales) are
        taken from it unchanged. Raises NumericsError if the weight is not finite or a scale does not fit the storage type.
        """
        if not all_finite(w):
            raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
        grid = (self.whole_runs if shared is None else self.block_grid)((w.shape[0], w.shape[1]))
        blocks = self.to_blocks(w.float())
        weights = None if importance is None else self.to_blocks(importance.float().expand(w.shape))
        # A few blocks at a time: the search reads them once per ratio, and they should stay in the processor's cache.
        tied = any(p.scope == "tensor" for p in self.grid.params)
        whole = {} if shared is None else self._whole(shared)
        size = len(blocks) if tied and shared is None else max(SEARCHED_TOGETHER // blocks.shape[1], 1)
        pieces = [slice(a, a + size) for a in range(0, len(blocks), size)]
        outer = self._outer(blocks, weights, pieces, grid) if shared is None else self._known_outer(shared)
        by_block = self._outer_by_block(outer, grid)
        own = self._own_search(blocks, weights, shrink, by_block)
        if own is not None:
            found = [own]
        else:
            found = []
            for piece in pieces:
                part = {p: {name: t[piece] for name, t in parts.items()} for p, parts in by_block.items()}
                found.append(self._search(blocks[piece], None if weights is None else weights[piece], shrink, part, whole))
        params = {
            p.name: torch.cat([f[p.name] for f in found]).reshape(*grid, *p.shape) if p.scope == "block" else found[0][p.name]
            for p in self.grid.params
        }
        return params | {shared_name(p, part): t for p, parts in outer.items() for part, t in parts.items()}

    def refit(
        self,
        params: Params,
        shape: tuple[int, int],
        column: int,
        w: Float[torch.Tensor, "out cols"],
        importance: Float[torch.Tensor, "*rows cols"] | None = None,
        shrink: Sequence[float] = (1.0,),
    ) -> Params:
        """Return `params` with the blocks that begin at `column` fitted again to `w`; shared values do not change."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        across, total = column // cols, shape[1] // cols
        here = dict(params)
        for p in self.grid.params:
            if p.kind == "scale":
                for part, t in self._known_outer(params)[p.name].items():
                    if t.ndim == 2 and t.shape[1] > 1:  # not shared along a whole row: one for each scale
                        width = t.shape[1] // total
                        here[shared_name(p.name, part)] = t[:, across * width : (across + 1) * width]
        fitted = Format(self.grid, Block(rows, cols), self.scale, self.layout).fit(w, importance, shrink, shared=here)
        changed = dict(params)
        for p in self.grid.params:
            if p.scope == "block":
                changed[p.name] = params[p.name].clone()
                changed[p.name][:, across : across + 1] = fitted[p.name]
        return changed

    def encode(self, w: Float[torch.Tensor, "out in"], params: Params) -> Int[torch.Tensor, "codes_down codes_across"]:
        """Return the nearest code of every weight under `params`, or the nearest stream of codes of every column."""
        if isinstance(self.grid, Streamed):
            return self.encode_columns(w.float(), self.spread(params, (w.shape[0], w.shape[1])))
        codes = self.grid.encode(self.to_blocks(w.float()), self.per_block(params))
        return self.from_blocks(codes, w.shape[0], self.grid.span)

    def decode(self, codes: Int[torch.Tensor, "codes_down codes_across"], params: Params) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32: `(codes - zero) * scale` for integers."""
        if isinstance(self.grid, Streamed):
            shape = (codes.shape[0] * self.rows_per_code, codes.shape[1])
            return self.decode_columns(codes, self.spread(params, shape))
        values = self.grid.decode(self.to_blocks(codes, self.grid.span), self.per_block(params))
        return self.from_blocks(values, codes.shape[0])

    def encode_columns(
        self, values: Float[torch.Tensor, "out cols"], params: Params
    ) -> Int[torch.Tensor, "codes_down codes_across"]:
        """Return the codes of some columns under the parameters of these, as `columns` returns them."""
        if not isinstance(self.grid, Streamed):
            return self.grid.encode(values, params)
        return self.grid.encode(values.T.contiguous(), {name: p.T for name, p in params.items()}).T

    def decode_columns(
        self, codes: Int[torch.Tensor, "codes_down codes_across"], params: Params
    ) -> Float[torch.Tensor, "out cols"]:
        """Return the weights of some columns."""
        if not isinstance(self.grid, Streamed):
            return self.grid.decode(codes, params)
        return self.grid.decode(codes.T, {name: p.T for name, p in params.items()}).T.contiguous()

    def columns(self, params: Params, shape: tuple[int, int], start: int) -> Params:
        """Return the parameters of column `start` for every row: `[out, 1, *shape]`, for loops over columns."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        across = start // cols
        at_column = {}
        for p in self.grid.params:
            value = params[p.name]
            if p.scope == "block":
                value = value[:, across : across + 1]
                value = value if rows == 1 else value.repeat_interleave(rows, 0)
            at_column[p.name] = value
        return at_column

    def spread(self, params: Params, shape: tuple[int, int]) -> Params:
        """Return single numbers for every row, `[out, 1]`, or for every weight if blocks part the columns."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        across = 1 if cols == shape[1] else cols
        return {p.name: params[p.name].repeat_interleave(rows, 0).repeat_interleave(across, 1) for p in self.grid.params}

    def choose(self, better: torch.Tensor, trial: Params, best: Params) -> dict[str, torch.Tensor]:
        """Return the parameters of `trial` in the blocks where `better` holds, and those of `best` elsewhere and for shared values."""
        chosen = dict(best)
        for p in self.grid.params:
            if p.scope == "block":
                chosen[p.name] = torch.where(better.view(*better.shape, *(1 for _ in p.shape)), trial[p.name], best[p.name])
        return chosen

    def stored(self, params: Params, shared: Params | None = None) -> Params:
        """Return parameters that a method chose itself, rounded as stored, with the values that scales share: those in `shared`, or new ones."""
        grid = next(params[p.name].shape[:2] for p in self.grid.params if p.scope == "block")
        chosen = (
            {p.name: self.store.outer(params[p.name].reshape(grid[0], -1)) for p in self._scales()} if shared is None else {}
        )
        outer = chosen if shared is None else self._known_outer(shared)
        rounded = self._rounded(self.per_block(params), self._outer_by_block(outer, (grid[0], grid[1])))
        kept = {p.name: rounded[p.name].reshape(params[p.name].shape) for p in self.grid.params}
        return kept | {shared_name(p, part): t for p, parts in outer.items() for part, t in parts.items()}

    def _search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        weights: torch.Tensor | None,
        shrink: Sequence[float],
        outer: Mapping[str, Mapping[str, torch.Tensor]],
        whole: Params,
    ) -> Params:
        fitted = self._fitted(blocks * shrink[0], weights, whole)
        best = self._rounded(fitted, outer)
        # A grid without scales learns its levels: it has no range to shrink, and would repeat the same fit for every ratio.
        ratios = shrink[1:] if self._scales() else ()
        beside = self._beside(fitted, outer, searched=len(ratios) > 0)
        if ratios or beside:
            whole = self._whole(best)
            best_error = self._error(blocks, weights, best)
        for name, place, other in beside:
            changed = best[name].clone(memory_format=torch.contiguous_format)
            changed.view(len(changed), -1)[:, place] = other.reshape(len(other), -1)[:, place]
            best, best_error = self._keep_better(blocks, weights, {**best, name: changed}, best, best_error)
        for ratio in ratios:
            trial = self._rounded(self._fitted(blocks * ratio, weights, whole), outer)
            best, best_error = self._keep_better(blocks, weights, trial, best, best_error)
        return best

    def _beside(
        self, fitted: Params, outer: Mapping[str, Mapping[str, torch.Tensor]], searched: bool
    ) -> list[tuple[str, int, torch.Tensor]]:
        """List the other stored scales to try, one scale of a block at a time: parameter, place among the scales, values.

        A search of several scales a block begins as without a search, so that it ends no worse.
        """
        bits = self.grid.code_bits / self.grid.span
        listed = []
        for p in self._scales():
            others = first_trials(self.store, fitted[p.name], outer[p.name], bits, searched)[1:]
            if searched and p.shape:
                others = first_trials(self.store, fitted[p.name], outer[p.name], bits, searched=False)[1:] + others
            listed += [(p.name, place, other) for other in others for place in range(math.prod(p.shape))]
        return listed

    def _keep_better(
        self, blocks: torch.Tensor, weights: torch.Tensor | None, trial: Params, best: Params, best_error: torch.Tensor
    ) -> tuple[Params, torch.Tensor]:
        """Return the better parameters of every block and their error; `best` of equals."""
        error = self._error(blocks, weights, trial)
        better = error < best_error
        return self.choose(better, trial, best), torch.where(better, error, best_error)

    def _own_search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        weights: torch.Tensor | None,
        shrink: Sequence[float],
        outer: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> Params | None:
        """Let the grid search all blocks at once if it can; None otherwise."""
        if not isinstance(self.grid, OwnSearch):
            return None
        return self.grid.search(blocks, weights, shrink, self.store, outer["scale"])

    def _whole(self, params: Params) -> Params:
        """Return only the parameters of the whole weight."""
        return {p.name: params[p.name] for p in self.grid.params if p.scope == "tensor"}

    def _fitted(self, blocks: torch.Tensor, weights: torch.Tensor | None, whole: Params) -> Params:
        """Fit all parameters, or only those of blocks if those of the whole weight are known."""
        if not whole:
            return self.grid.fit(blocks, weights)
        assert isinstance(self.grid, SharedParams), f"{self.grid.name} has parameters of the whole weight and no fit_blocks"
        return {**self.grid.fit_blocks(blocks, whole, weights), **whole}

    def _rounded(self, params: Params, outer: Mapping[str, Mapping[str, torch.Tensor]]) -> Params:
        rounded = {}
        for p in self.grid.params:
            value = params[p.name]
            if p.kind == "scale":
                value = self.store.round(value, outer[p.name])
            elif p.kind == "value":
                value = value.to(p.value_type).float()
                if not bool(torch.isfinite(value).all()):
                    raise NumericsError(f"{p.name} of {self.grid.name} is beyond the range of {p.value_name}.")
            rounded[p.name] = value
        return rounded

    def _error(self, blocks: torch.Tensor, weights: torch.Tensor | None, params: Params) -> torch.Tensor:
        difference = self.grid.decode(self.grid.encode(blocks, params), params).sub_(blocks).square_()
        return (difference if weights is None else difference.mul_(weights)).sum(-1, keepdim=True)

    def _scales(self) -> list[StoredParam]:
        return [p for p in self.grid.params if p.kind == "scale"]

    def _outer(
        self, blocks: torch.Tensor, weights: torch.Tensor | None, pieces: Sequence[slice], grid: tuple[int, int]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Choose the shared values of the scales from scales that clip nothing."""
        if len(self.store.expected(1, 1)) == 1:
            return {p.name: {} for p in self._scales()}
        fitted = [self.grid.fit(blocks[piece], None if weights is None else weights[piece]) for piece in pieces]
        return {p.name: self.store.outer(torch.cat([f[p.name] for f in fitted]).reshape(grid[0], -1)) for p in self._scales()}

    def _known_outer(self, params: Params) -> dict[str, dict[str, torch.Tensor]]:
        names = [part for part in self.store.expected(1, 1) if part]
        return {p.name: {part: params[shared_name(p.name, part)] for part in names} for p in self._scales()}

    def _outer_by_block(
        self, outer: Mapping[str, Mapping[str, torch.Tensor]], grid: tuple[int, int]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return the shared values of scales as `[blocks, 1, *shape]`, in the same order as the grid's scales."""
        by_block: dict[str, dict[str, torch.Tensor]] = {}
        for p in self._scales():
            width = grid[1] * math.prod(p.shape)
            by_block[p.name] = {part: t.expand(grid[0], width).reshape(-1, 1, *p.shape) for part, t in outer[p.name].items()}
        return by_block

    def per_block(self, params: Params) -> Params:
        """Return parameters in the grid's shape: `[blocks, 1, *shape]`, or `shape` for the whole weight."""
        return {
            p.name: params[p.name].reshape(-1, 1, *p.shape) if p.scope == "block" else params[p.name] for p in self.grid.params
        }

    def _extent(self, shape: tuple[int, int], unit: int) -> tuple[int, int]:
        rows, cols = self.block.resolve((shape[0], shape[1] * unit), self.grid.span)
        return rows, cols // unit

    def to_blocks(self, values: torch.Tensor, unit: int = 1) -> torch.Tensor:
        """`[out, in / unit]` -> `[blocks, values of a block]`, blocks in row-major order; a code is `unit` weights."""
        rows, cols = self._extent((values.shape[0], values.shape[1]), unit)
        if rows == 1:
            return values.reshape(-1, cols)
        down, across = values.shape[0] // rows, values.shape[1] // cols
        return values.reshape(down, rows, across, cols).transpose(1, 2).reshape(-1, rows * cols)

    def from_blocks(self, blocks: torch.Tensor, out_features: int, unit: int = 1) -> torch.Tensor:
        """Return what `to_blocks` cut, as `[out, in / unit]`."""
        width = blocks.numel() // out_features
        rows, cols = self._extent((out_features, width), unit)
        if rows == 1:
            return blocks.reshape(out_features, width)
        return blocks.reshape(out_features // rows, width // cols, rows, cols).transpose(1, 2).reshape(out_features, width)
