"""The native layout: compressed weights in strips of 16 output rows side by side, as native code reads them.

    codes    1 to 8 bits as planes of 4, 2 and 1 bits (8 bits: bytes), line after line of 64 bytes: 16 rows x 4 columns of bytes that
             hold 2, 4 or 8 columns each; every group of columns is padded to whole lines
    scales   fp32, fp16, bf16, e8m0 or e4m3 as the format stores them, 16 rows side by side; zero points likewise
    table    grids of up to 16 levels: the levels in float, and the bytes nearest to them for products with 8-bit activations
    map      of the inputs, applied to a row before its product: gathers, scales, rotations that are products of small factors
    dense    fp16 with a factor a row, or bf16: terms whose grids have no layout here, and weights that are not compressed

`lay_out` makes a `NativeLayout` of a weight. It repeats no choice that the format has made already, so `row` returns the values of
`dequantize`. Weights that have no such layout are decoded to 16 bits, and `expanded` names them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bitpress import native
from bitpress.formats import CompressedWeight
from bitpress.formats.format import Format
from bitpress.formats.grids.grid import Grid, Params
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.planes import Planes
from bitpress.formats.maps.map import Chain, Map, Permutation, Scale
from bitpress.formats.maps.rotations import Hadamard, Kronecker, hadamard_matrix
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import Sparse
from bitpress.formats.weight import Term

__all__ = ["NativeLayout", "has_layout", "lay_out", "lay_out_matrix", "reason_to_expand"]

# Bytes that approximate levels lie between these, so that no sum of products of two bytes overflows.
BYTE_REACH = 127
# Scales that are read as they are stored. Scales with a shared part (s4, s6, s8, p2row, dq) are read as fp32.
PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OFFSET = 128


@dataclass
class NativeLayout:
    """A weight in native memory; `expanded` names the parts that were decoded to 16 bits, and why."""

    linear: Any
    shape: tuple[int, int]
    expanded: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return int(self.linear.nbytes)

    def row(self, index: int) -> Float[torch.Tensor, " in"]:
        """Return one output row of the weight, maps included, in float32."""
        values = torch.empty(self.shape[1])
        self.linear.row(index, values.numpy())
        return values


def lay_out(weight: CompressedWeight, bias: torch.Tensor | None = None) -> NativeLayout:
    """Lay a compressed weight out. Raises KernelUnavailable without the native library."""
    strips = _empty(weight.shape)
    if weight.output_map is not None:
        strips.expanded.append(_map_reason(weight.output_map))
        _add_dense(strips, weight.dequantize())
    else:
        if weight.input_map is not None:
            strips.linear.set_map(_steps(weight.input_map))
        _add_terms(strips, weight.terms)
    return _with_bias(strips, bias)


def lay_out_matrix(w: Float[torch.Tensor, "out in"], bias: torch.Tensor | None = None) -> NativeLayout:
    """Lay a matrix out in 16 bits: bf16 and fp16 as they are, others as fp16 with a factor a row."""
    strips = _empty((w.shape[0], w.shape[1]))
    _add_dense(strips, w)
    return _with_bias(strips, bias)


def reason_to_expand(weight: CompressedWeight) -> str | None:
    """Say which part of a weight would be decoded to 16 bits, or None."""
    if weight.output_map is not None:
        return _map_reason(weight.output_map)
    return next((reason for term in weight.terms if (reason := _term_reason(term)) is not None), None)


def _map_reason(output_map: Map) -> str:
    return f"a map of the outputs ({output_map.kind})"


def _steps(change: Map) -> list[dict[str, Any]]:
    """Return a map as native code takes it: gathers, scales, and products of every block with left ⊗ right."""
    if isinstance(change, Chain):
        steps: list[dict[str, Any]] = []
        for step in (step for part in change.maps for step in _steps(part)):
            if steps and steps[-1]["kind"] == step["kind"] == "scale":
                steps[-1] = {"kind": "scale", "values": steps[-1]["values"] * step["values"]}
            else:
                steps.append(step)
        return steps
    if isinstance(change, Permutation):
        return [{"kind": "gather", "order": change.order.to(torch.int32).contiguous().numpy()}]
    if isinstance(change, Scale):
        return [_scaling(change.scale)]
    if isinstance(change, Kronecker):
        left, right = _flat(change.left), _flat(change.right)
        across = change.left.shape[0]
        block = across * change.right.shape[0]
        return [{"kind": "mix", "block": block, "across": across, "right": right, **({"left": left} if across > 1 else {})}]
    assert isinstance(change, Hadamard), change.kind
    mix: dict[str, Any] = {"kind": "mix", "block": change.block, "across": change.core}
    if change.core > 1:
        mix["left"] = _flat(hadamard_matrix(change.core))
    return [_scaling(change.factors() / math.sqrt(change.block)), mix]


def _scaling(factors: torch.Tensor) -> dict[str, Any]:
    return {"kind": "scale", "values": _flat(factors)}


def _flat(values: torch.Tensor) -> np.ndarray:
    return values.float().contiguous().flatten().numpy()


def _term_reason(term: Term) -> str | None:
    if isinstance(term, Packed):
        return None if term.parts == 1 and has_layout(term.format) else term.format.name
    if isinstance(term, LowRank):
        return None if term.parts == 1 else "low_rank of a stack"
    return None if isinstance(term, Sparse) else term.kind


def _empty(shape: tuple[int, int]) -> NativeLayout:
    return NativeLayout(native.library().Linear(*shape), shape)


def _with_bias(strips: NativeLayout, bias: torch.Tensor | None) -> NativeLayout:
    if bias is not None:
        strips.linear.set_bias(bias.float().contiguous().numpy())
    return strips


def _add_terms(strips: NativeLayout, terms: tuple[Term, ...]) -> None:
    low_rank, sparse = False, False
    for term in terms:
        reason = _term_reason(term)
        if isinstance(term, Packed) and reason is None:
            _add_packed(strips, term)
        elif isinstance(term, LowRank) and reason is None and not low_rank:
            low_rank = True
            _set_low_rank(strips, term)
        elif isinstance(term, Sparse) and not sparse:
            sparse = True
            _set_sparse(strips, term)
        else:
            strips.expanded.append(reason or term.kind)
            _add_dense(strips, term.dequantize())


def _halves(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint16).numpy()


def _add_dense(strips: NativeLayout, w: torch.Tensor) -> None:
    threads = torch.get_num_threads()
    if w.dtype == torch.float32 and torch.equal(w.bfloat16().float(), w):
        w = w.bfloat16()
    if w.dtype in (torch.bfloat16, torch.float16):
        strips.linear.add_dense(_halves(w), w.dtype == torch.float16, None, threads)
        return
    gain = w.float().abs().amax(1)
    gain = torch.where(gain > 0, gain, 1.0)
    strips.linear.add_dense(_halves((w.float() / gain[:, None]).half()), True, gain.numpy(), threads)


def _set_low_rank(strips: NativeLayout, term: LowRank) -> None:
    a, b = term.factors()
    kind = term.tensors["a"].dtype if "a" in term.tensors else torch.float16
    kind = kind if kind in (torch.float16, torch.bfloat16) else torch.float16
    strips.linear.set_low_rank(_halves(b.to(kind)), _halves(a.to(kind)), kind == torch.float16, torch.get_num_threads())


def _set_sparse(strips: NativeLayout, term: Sparse) -> None:
    column = term.tensors["column"] if term.count else torch.empty(0, dtype=torch.int32)
    value = term.tensors["value"] if term.count else torch.empty(0)
    strips.linear.set_sparse(
        term.tensors["row_start"].long().numpy(), column.to(torch.int32).numpy(), value.float().contiguous().numpy()
    )


# ---- codes ----


@dataclass(frozen=True)
class _Codes:
    """One plane of native codes: `w = scale * gain * (code - zero)`, or `scale * level[code]` by a table."""

    bits: int
    recode: Callable[[torch.Tensor], torch.Tensor]
    gain: float = 1.0
    zero: int = 0
    levels: tuple[float, ...] | None = None
    plane: int | None = None


def has_layout(fmt: Format) -> bool:
    """Return whether the native engine reads the codes of a format, rather than decode them to 16 bits."""
    return bool(_plan(fmt.grid))


def _plan(grid: Grid) -> list[_Codes]:
    """Return how the codes of a grid become native ones; nothing if they cannot."""
    if isinstance(grid, Integer):
        return [_Codes(grid.bits, lambda codes: codes, zero=0 if grid.zero else 1 << (grid.bits - 1))]
    if isinstance(grid, Planes):
        return _plan_planes(grid)
    if isinstance(grid, Levels):
        if len(grid.levels) <= 16 and grid.code_bits <= 4:
            levels = tuple(0.0 if level != level else level for level in grid.levels)
            return [_Codes(grid.code_bits, lambda codes: codes, levels=levels)]
        return _plan_even(grid)
    return []


def _plan_planes(grid: Planes) -> list[_Codes]:
    plans, below = [], 1
    for index, digits in enumerate(grid.digits):
        count = len(digits)

        def recode(codes: torch.Tensor, below: int = below, count: int = count) -> torch.Tensor:
            return (codes // below % count).to(torch.uint8)

        levels = tuple(float(d) for d in digits)
        plans.append(_Codes((count - 1).bit_length(), recode, levels=levels, plane=index))
        below *= count
    return plans


def _plan_even(grid: Levels) -> list[_Codes]:
    """Turn levels that are whole multiples of a step into whole numbers in as few bits as possible: bipolar5, mxint8, e2m3 and the like."""
    if grid.code_bits > 8:
        return []
    real = torch.tensor([0.0 if level != level else level for level in grid.levels], dtype=torch.float64)
    step = float(real[real != 0].abs().min())
    for divisor in (1, 2, 3):
        whole = real / (step / divisor)
        if bool((whole == whole.round()).all()) and whole.min() >= -OFFSET and whole.max() <= BYTE_REACH:
            zero = max(0, -int(whole.min()))
            bits = (int(whole.max()) + zero).bit_length()
            return [_Codes(bits, _through((whole + zero).to(torch.uint8)), gain=step / divisor, zero=zero)]
    return []


def _through(table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda codes: table[codes.int()]


def _nearest_bytes(levels: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """Return a step and the whole number for every level whose multiple of the step is nearest to it; exact if the levels are multiples."""
    values = np.array(levels)
    most = float(np.abs(values).max())
    best: tuple[float, np.ndarray, float] | None = None
    for top in range(1, BYTE_REACH + 1):
        whole = np.rint(values / most * top)
        error = float(np.abs(whole * (most / top) - values).max()) / most
        error = 0.0 if error < 1e-9 else error
        if best is None or error < best[0]:
            best = (error, whole, most / top)
    assert best is not None
    return best[1], best[2]


def _add_packed(strips: NativeLayout, term: Packed) -> None:
    fmt = term.format
    rows, cols = fmt.block.resolve(term.shape, fmt.grid.span)
    codes, params = term.unpack()
    threads = torch.get_num_threads()
    for plan in _plan(fmt.grid):
        kind, scales, gain = _native_scales(term, params, plan.plane)
        if rows > 1:
            scales = scales.repeat_interleave(rows, 0)
        zeros = params["zero"].to(torch.uint8) if isinstance(fmt.grid, Integer) and fmt.grid.zero else None
        if zeros is not None and rows > 1:
            zeros = zeros.repeat_interleave(rows, 0)
        table, levels, zero, step = None, None, plan.zero, plan.gain
        if plan.levels is not None:
            whole, step = _nearest_bytes(plan.levels)
            filled = len(plan.levels)
            table, levels = np.full(16, OFFSET, np.uint8), np.zeros(16, np.float32)
            table[:filled] = whole + OFFSET
            levels[:filled] = np.array(plan.levels, np.float32) * gain
            zero = OFFSET
        strips.linear.add_codes(
            plan.recode(codes).to(torch.uint8).contiguous().numpy(),
            plan.bits,
            cols,
            kind,
            _as_bytes(scales),
            step * gain,
            None if zeros is None else zeros.contiguous().numpy(),
            zero,
            table,
            levels,
            threads,
        )


def _native_scales(term: Packed, params: Params, plane: int | None) -> tuple[str, torch.Tensor, float]:
    """Return kind, values `[down, across]` and common factor of a term's scales; as they are stored if native code reads that type."""
    fmt = term.format
    if plane is not None:
        scales = params["scale"][..., plane]
        return (fmt.scale, scales.to(PLAIN[fmt.scale]), 1.0) if fmt.scale in PLAIN else ("fp32", scales.contiguous(), 1.0)
    down, across = fmt.block_grid(term.shape)
    if fmt.scale in PLAIN:
        return fmt.scale, term.tensors["scale"].reshape(down, across), 1.0
    if fmt.scale == "e8m0":
        stored = term.tensors["scale"].reshape(down, across)
        if int(stored.min()) > 0:  # 2^-127 is not a normal float
            return "e8m0", stored, 1.0
    if fmt.scale == "fp8":
        return "fp8", term.tensors["scale"].reshape(down, across), float(term.tensors["scale_tensor"])
    return "fp32", params["scale"].reshape(down, across).contiguous(), 1.0


def _as_bytes(scales: torch.Tensor) -> np.ndarray:
    # A single scale of several planes counts as contiguous whatever its stride, which the view refuses.
    return scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(scales.shape[0], -1).numpy()
