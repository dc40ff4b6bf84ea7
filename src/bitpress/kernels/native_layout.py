"""The native layout: compressed weights in strips of 16 output rows side by side, as native code reads them.

    codes    1 to 8 bits as planes of 4, 2 and 1 bits (8 bits: bytes), line after line of 64 bytes: 16 rows x 4 columns of bytes that
             hold 2, 4 or 8 columns each; every group of columns is padded to whole lines. Trits: 5 columns a byte. Terms of some columns
             hold those alone
    scales   as the format stores them, 16 rows side by side; zero points and minima likewise
    table    grids of up to 16 levels: the levels in float, and the bytes nearest to them for products with 8-bit activations
    map      of the inputs, applied to a row before its product: gathers, scales, rotations that are products of small factors
    rounding of the inputs behind the map, where the model has one of its own: integers, and products with integers of weights are sums
             of whole numbers (`kernels.integers`)
    dense    fp16 with a factor a row, or bf16: terms whose grids have no layout here, and weights that are not compressed

`lay_out` makes a `NativeLayout` of a weight. It repeats no choice that the format has made already, so `row` returns the values of
`dequantize`. Weights that have no such layout are decoded to 16 bits, and `expanded` names them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bitpress import native
from bitpress.formats import ChannelFormat, CompressedWeight, InputFormat
from bitpress.formats.format import Format
from bitpress.formats.grids.integer import Integer
from bitpress.formats.terms.kept import Kept
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import Sparse
from bitpress.formats.weight import Term
from bitpress.kernels.integers import run_columns
from bitpress.kernels.native_codes import Codes, plan_codes
from bitpress.kernels.native_maps import foreign_kind, map_steps
from bitpress.kernels.native_scales import native_floats, native_scales

__all__ = ["NativeLayout", "has_layout", "lay_out", "lay_out_matrix", "packed_factors", "reason_to_expand"]


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


def lay_out(weight: CompressedWeight, bias: torch.Tensor | None = None, inputs: InputFormat | None = None) -> NativeLayout:
    """Lay a compressed weight out, for inputs that `refuses_input` accepts. Raises KernelUnavailable without the native library."""
    assert not isinstance(inputs, ChannelFormat) or (inputs.shift is None and inputs.copies is None), inputs.name
    strips = _empty(weight.shape)
    if (reason := _map_reason(weight)) is not None:  # the weight as a whole, for inputs as they are
        assert inputs is None
        strips.expanded.append(reason)
        _add_dense(strips, weight.dequantize())
        return _with_bias(strips, bias)
    if weight.input_map is not None:
        strips.linear.set_map(map_steps(weight.input_map))
    if weight.output_map is not None:
        strips.linear.set_out_map(map_steps(weight.output_map))
    if inputs is not None:
        strips.linear.set_rounding(_rounding(inputs, weight.shape[1]))
    _add_terms(strips, weight.terms, inputs)
    return _with_bias(strips, bias)


def lay_out_matrix(w: Float[torch.Tensor, "out in"], bias: torch.Tensor | None = None) -> NativeLayout:
    """Lay a matrix out in 16 bits: bf16 and fp16 as they are, others as fp16 with a factor a row."""
    strips = _empty((w.shape[0], w.shape[1]))
    _add_dense(strips, w)
    return _with_bias(strips, bias)


def reason_to_expand(weight: CompressedWeight) -> str | None:
    """Say which part of a weight would be decoded to 16 bits, or None."""
    return _map_reason(weight) or next((reason for term in weight.terms if (reason := _term_reason(term)) is not None), None)


def _map_reason(weight: CompressedWeight) -> str | None:
    return next(
        (kind for m in (weight.input_map, weight.output_map) if m is not None and (kind := foreign_kind(m)) is not None), None
    )


def _rounding(inputs: InputFormat, columns: int) -> dict[str, Any]:
    """Return the rounding of inputs as native code takes it."""
    if isinstance(inputs, ChannelFormat):
        assert inputs.first is not None
        first = {"columns": inputs.count, **_rounding(inputs.first, inputs.count)}
        return {**_rounding(inputs.rest, columns - inputs.count), "first": first}
    fmt, grid = inputs.format, inputs.format.grid
    assert isinstance(grid, Integer), fmt.name
    rounding = {"bits": grid.bits, "has_zero": grid.zero, "group": fmt.block.resolve((1, columns))[1]}
    if inputs.parameters == "dynamic":
        return {**rounding, "kind": fmt.scale}
    params = inputs.stored()
    zero = params["zero"] if grid.zero else torch.tensor(1 << (grid.bits - 1))
    return {**rounding, "kind": "fp32", "scale": float(params["scale"]), "zero": int(zero)}


def _term_reason(term: Term) -> str | None:
    if isinstance(term, Packed):
        return None if term.parts == 1 and has_layout(term.format) and _is_smaller(term) else term.format.name
    if isinstance(term, Kept):
        if term.axis == "rows" or term.parts > 1:
            return f"{term.axis} kept in {term.format.name}"
        return _term_reason(term.packed) if term.count else None
    if isinstance(term, LowRank):
        return None if term.parts == 1 else "low_rank of a stack"
    return None if isinstance(term, Sparse) else term.kind


def _is_smaller(term: Packed) -> bool:
    """Return whether codes take less than 16 bits a weight: small blocks may not."""
    return sum(t.numel() * t.element_size() for t in term.tensors.values()) < 2 * term.shape[0] * term.shape[1]


def _empty(shape: tuple[int, int]) -> NativeLayout:
    return NativeLayout(native.library().Linear(*shape), shape)


def _with_bias(strips: NativeLayout, bias: torch.Tensor | None) -> NativeLayout:
    if bias is not None:
        strips.linear.set_bias(bias.float().contiguous().numpy())
    return strips


def _add_terms(strips: NativeLayout, terms: tuple[Term, ...], inputs: InputFormat | None) -> None:
    low_rank, sparse = False, False
    rest: torch.Tensor | None = None
    for term in terms:
        reason = _term_reason(term)
        if isinstance(term, Packed) and reason is None:
            _add_packed(strips.linear, term, inputs=inputs)
        elif isinstance(term, Kept) and reason is None:
            if term.count:
                _add_packed(strips.linear, term.packed, term.chosen()[0].nonzero()[:, 0])
        elif isinstance(term, LowRank) and reason is None and not low_rank:
            low_rank = True
            _set_low_rank(strips, term)
        elif isinstance(term, Sparse) and not sparse:
            sparse = True
            _set_sparse(strips, term)
        else:
            strips.expanded.append(reason or term.kind)
            rest = term.dequantize() if rest is None else rest + term.dequantize()
    if rest is not None:  # one matrix for all that is expanded
        _add_dense(strips, rest)


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
    if (packed := packed_factors(term)) is not None:
        up, down = (native.library().Linear(*factor.shape) for factor in packed)
        for linear, factor in zip((up, down), packed, strict=True):
            _add_packed(linear, factor)
        strips.linear.set_low_rank_codes(down, up)
        return
    a, b = term.factors()
    kind = term.tensors["a"].dtype if "a" in term.tensors else torch.float16
    kind = kind if kind in (torch.float16, torch.bfloat16) else torch.float16
    strips.linear.set_low_rank(_halves(b.to(kind)), _halves(a.to(kind)), kind == torch.float16, torch.get_num_threads())


def packed_factors(term: LowRank) -> tuple[Packed, Packed] | None:
    """Return the factors [out, rank] and [rank, in] of a term whose codes products read; None where they are read in 16 bits."""
    packed = term.packed_factors()
    if packed is None or any(_term_reason(factor) is not None or len(plan_codes(factor.format)) > 1 for factor in packed):
        return None
    return packed


def _set_sparse(strips: NativeLayout, term: Sparse) -> None:
    column = term.tensors["column"] if term.count else torch.empty(0, dtype=torch.int32)
    value = term.tensors["value"] if term.count else torch.empty(0)
    strips.linear.set_sparse(
        term.tensors["row_start"].long().numpy(), column.to(torch.int32).numpy(), value.float().contiguous().numpy()
    )


# ---- codes ----


def has_layout(fmt: Format) -> bool:
    """Return whether the native engine reads the codes of a format, rather than decode them to 16 bits."""
    return bool(plan_codes(fmt))


def _add_packed(linear: Any, term: Packed, picked: torch.Tensor | None = None, inputs: InputFormat | None = None) -> None:
    """Add the codes of a term: of all columns of a layer, or of those picked. Blocks are cut where groups of rounded inputs end."""
    fmt = term.format
    rows, cols = fmt.block.resolve(term.shape, fmt.grid.span)
    down, across = fmt.block_grid(term.shape)
    params = term.unpack_params()
    cut = cols
    if inputs is not None and isinstance(fmt.grid, Integer):
        cut = run_columns(fmt, inputs, term.shape)
    for plan in plan_codes(fmt):
        scales = native_scales(term, plan.plane, plan.planes)
        table, levels, step = plan.table() if plan.levels is not None else (None, None, 1.0)
        has_zeros = "zero" in params and plan.less != "zero"
        zeros = params["zero"].to(torch.uint8).reshape(down, across).contiguous().numpy() if has_zeros else None
        linear.add_codes(
            _code_bytes(plan.take(term), plan.bits),
            plan.bits,
            cut,
            scales.kind,
            _repeated(scales.values, across, cols // cut),
            plan.gain * scales.gain,
            None if zeros is None else _repeated(zeros, across, cols // cut),
            plan.zero,
            table,
            levels,
            torch.get_num_threads(),
            tall=rows,
            step=step,
            shared=scales.shared,
            meaning=None if plan.meaning is None else plan.meaning(term, params),
            packing=plan.packing,
            picked=None if picked is None else picked.to(torch.int32).numpy(),
            less=_less(term, plan),
        )


def _repeated(values: np.ndarray, across: int, times: int) -> np.ndarray:
    """Return the bytes of values `[down, across]` with every value repeated along its row."""
    if times == 1:
        return values
    each = values.reshape(values.shape[0], across, -1).repeat(times, axis=1)
    return np.ascontiguousarray(each).reshape(values.shape[0], -1)


def _less(term: Packed, plan: Codes) -> dict[str, Any] | None:
    """Return what is taken away from codes or weights, as native code takes it."""
    if plan.less is None:
        return None
    made = native_floats(term, plan.less) if plan.less_of_codes else native_scales(term, name=plan.less)
    return {
        "of_codes": plan.less_of_codes,
        "kind": made.kind,
        "values": made.values,
        "gain": made.gain,
        "shared": made.shared,
    }


def _code_bytes(codes: torch.Tensor, bits: int) -> np.ndarray:
    """Return codes as the bytes that native code takes: one each up to 8 bits, two up to 16, four beyond."""
    width = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    made: np.ndarray = codes.numpy().astype(width, order="C", copy=False).view(np.uint8)
    return made
