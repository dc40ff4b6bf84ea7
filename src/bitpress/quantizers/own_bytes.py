"""What a quantizer stores beside the codes of its format, from shapes alone: bytes for a plan.

    weight   shape [out, in] of one weight, parts of which are stacked (experts)

Exact where settings and shapes decide it. Where the weights do, the most that the settings aim at is counted: the shares of
spqr, squeezellm and quantease; for easyquant what a normal distribution has beyond its limit.
"""

import math
from collections.abc import Callable
from typing import Any

from bitpress.formats import TERMS, Format, parse_format
from bitpress.quantizers.aligned_groups import AlignedGroups, twice_as_wide
from bitpress.quantizers.bitstack import BitStack
from bitpress.quantizers.easyquant import EasyQuant
from bitpress.quantizers.pb_llm import PBLLM
from bitpress.quantizers.ptq161 import PTQ161
from bitpress.quantizers.ptqtp import PTQTP
from bitpress.quantizers.quantease import QuantEase
from bitpress.quantizers.quip_sharp import BOOKS, QuIPSharp
from bitpress.quantizers.spqr import SpQR
from bitpress.quantizers.squeezellm import SqueezeLLM

__all__ = ["OWN_BYTES", "own_bytes"]

Shape = tuple[int, int]


def own_bytes(quantizer: Any, fmt: Format, shape: Shape, parts: int = 1) -> int:
    """Return the bytes of a quantizer's terms less those of the format alone; 0 for methods that are not in the table.

    Raises FormatError and UsageError for terms that the shape does not have.
    """
    count = OWN_BYTES.get(type(quantizer))
    return 0 if count is None else count(quantizer, fmt, shape, parts)


def _term(kind: str, shape: Shape, parts: int, **spec: Any) -> int:
    spec = spec if parts == 1 or kind == "sparse" else {**spec, "parts": parts}
    tensors = TERMS[kind].expected(spec, (shape[0] * parts, shape[1]))
    return sum(dtype.itemsize * math.prod(dims) for dtype, dims in tensors.values())


def _apart(count: int, shape: Shape, parts: int) -> int:
    return _term("sparse", shape, parts, count=count * parts)


def _if_any(count: int, shape: Shape, parts: int) -> int:
    return _apart(count, shape, parts) if count else 0


def _bit_stack(q: BitStack, fmt: Format, shape: Shape, parts: int) -> int:
    signs = fmt.nbytes((shape[0] * parts, shape[1]))
    return q.terms * _term("sign_low_rank", shape, parts, rank=q.rank, dtype=q.dtype) - signs


def _second_book(q: QuIPSharp, fmt: Format, shape: Shape, parts: int) -> int:
    book = BOOKS[q.residual][0]
    return 0 if book is None else Format(book, fmt.block, fmt.scale).nbytes((shape[0] * parts, shape[1]))


def _second_plane(q: PTQTP, fmt: Format, shape: Shape, parts: int) -> int:
    return 0 if fmt.grid.num_codes == 9 else fmt.nbytes((shape[0] * parts, shape[1]))


def _columns(high: Format, low: Format, taken: int, shape: Shape, parts: int) -> int:
    """Return the bytes of some columns in one format and the others in another, less those of all in the second."""
    whole = low.nbytes((shape[0] * parts, shape[1]))
    if taken in (0, shape[1]):
        return (high if taken else low).nbytes((shape[0] * parts, shape[1])) - whole
    pieces = ((high, taken), (low, shape[1] - taken))
    return sum(_term("kept", shape, parts, axis="columns", count=n, format=f.name) for f, n in pieces) - whole


def _salient_columns(q: PTQ161, fmt: Format, shape: Shape, parts: int) -> int:
    width = shape[1]
    cols = 1 if fmt.block.cols == "all" else fmt.block.resolve(shape)[1]
    others = max((width - round(q.salient * width)) // cols * cols, cols)
    # Even without salient columns the binary ones are kept columns, with a mask.
    none = _term("kept", shape, parts, axis="columns", count=width, format=fmt.name) - fmt.nbytes((shape[0] * parts, width))
    return none if others == width else _columns(parse_format(q.high), fmt, width - others, shape, parts)


def _wide_groups(q: AlignedGroups, fmt: Format, shape: Shape, parts: int) -> int:
    cols = fmt.block.resolve(shape)[1]
    across = shape[1] // cols
    count = min(round(q.share * across) or 1, across - 1) if 0 < q.share < 1 else round(q.share * across)
    return _columns(twice_as_wide(fmt), fmt, count * cols, shape, parts)


OWN_BYTES: dict[type[Any], Callable[[Any, Format, Shape, int], int]] = {
    BitStack: _bit_stack,
    QuIPSharp: _second_book,
    PTQTP: _second_plane,
    PTQ161: _salient_columns,
    AlignedGroups: _wide_groups,
    PBLLM: lambda q, fmt, shape, parts: _apart(int(q.salient * math.prod(shape)), shape, parts),
    SpQR: lambda q, fmt, shape, parts: _apart(round(q.most * math.prod(shape)), shape, parts),
    SqueezeLLM: lambda q, fmt, shape, parts: _if_any(
        int(q.sensitive * math.prod(shape)) + int(q.outliers * math.prod(shape)), shape, parts
    ),
    QuantEase: lambda q, fmt, shape, parts: _if_any(round(q.outliers * math.prod(shape)), shape, parts),
    EasyQuant: lambda q, fmt, shape, parts: _if_any(round(math.erfc(q.sigmas / math.sqrt(2)) * math.prod(shape)), shape, parts),
}
