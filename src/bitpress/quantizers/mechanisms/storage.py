"""Bytes of terms from shapes alone, for quantizers that store more than the codes of their format.

shape   [out, in] of one weight, `parts` of which are stacked (experts)
"""

import math

from bitpress.formats import TERMS, Format

__all__ = ["Shape", "column_bytes", "sparse_bytes", "term_bytes"]

Shape = tuple[int, int]


def term_bytes(kind: str, shape: Shape, parts: int, *, each: int = 1, **spec: object) -> int:
    """Return the bytes of a term by its kind and specification, `each` parts of its own in every weight.

    Raises FormatError for one that the shape does not have.
    """
    spec = spec if parts * each == 1 or kind == "sparse" else {**spec, "parts": parts * each}
    tensors = TERMS[kind].expected(spec, (shape[0] * parts, shape[1]))
    return sum(dtype.itemsize * math.prod(dims) for dtype, dims in tensors.values())


def sparse_bytes(count: int, shape: Shape, parts: int) -> int:
    """Return the bytes of a sparse term with `count` single weights of every part."""
    return term_bytes("sparse", shape, parts, count=count * parts)


def column_bytes(high: Format, low: Format, taken: int, shape: Shape, parts: int) -> int:
    """Return the bytes of `taken` columns in one format and the others in another."""
    if taken in (0, shape[1]):
        return (high if taken else low).nbytes((shape[0] * parts, shape[1]))
    pieces = ((high, taken), (low, shape[1] - taken))
    return sum(term_bytes("kept", shape, parts, axis="columns", count=n, format=f.name) for f, n in pieces)
