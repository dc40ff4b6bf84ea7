"""The native product: reads codes in a native layout, which is made at a layer's first product.

Inputs stay in float, so results are the reference's up to rounding. The layout lives as long as the kernel, beside the weight's own tensors.
"""

import atexit
import functools
import os
import weakref
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.formats import CompressedLayer, CompressedWeight
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.sparse import Sparse
from bitpress.kernels.native_layout import NativeLayout, lay_out, packed_factors, reason_to_expand
from bitpress.kernels.reference import Reference

__all__ = ["Native"]

ROWS = 1 << 16  # of x at once


class Native:
    """The product of one layer. The layer is laid out at its first product."""

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        self._layout: NativeLayout | None = None
        _made.add(self)

    @staticmethod
    def refuses(layer: CompressedLayer) -> str | None:
        if layer.device.type != "cpu":
            return f"the layer is on {layer.device.type}, not on the CPU"
        if not native.available():
            return "the native library is not there"
        if layer.input is not None:
            return f"its input is rounded ({layer.input.name}), and inputs stay in float here"
        return _refusal(layer.weight)

    def matmul(self, x: Float[torch.Tensor, "*batch in"], layer: CompressedLayer) -> Float[torch.Tensor, "*batch out"]:
        if x.dtype == torch.float64 or (x.requires_grad and torch.is_grad_enabled()):
            return Reference().matmul(x, layer)
        if self._layout is None:
            self._layout = lay_out(layer.weight)
        out = layer.shape[0]
        rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], out)
        multiplier = _multiplier(torch.get_num_threads(), native.chosen_path(), os.getpid())
        for start in range(0, rows.shape[0], ROWS):
            part = slice(start, start + ROWS)
            multiplier.multiply(self._layout.linear, rows[part].numpy(), y[part].numpy(), False)
        return y.reshape(*x.shape[:-1], out).to(x.dtype)

    def forget(self) -> None:
        """Drop the layout; it is made again when it is needed."""
        self._layout = None


@functools.cache
def _multiplier(threads: int, path: str, process: int) -> Any:
    """Return the product of this process, with its own threads: a forked process has none of its parent's."""
    return native.library().Multiplier(threads, path)


_made: weakref.WeakSet[Native] = weakref.WeakSet()


def _forget_all() -> None:
    for kernel in list(_made):
        kernel.forget()


# nanobind complains about objects that outlive the interpreter, such as those of a model in a global variable.
atexit.register(_multiplier.cache_clear)
atexit.register(_forget_all)


def _refusal(weight: CompressedWeight) -> str | None:
    """Say which part of a weight a native layout would round, or None. A kernel must agree with the reference; only an engine may round."""
    pairs = [term for term in weight.terms if isinstance(term, LowRank)]
    if len(pairs) > 1 or sum(isinstance(term, Sparse) for term in weight.terms) > 1:
        return "it has several terms of one kind beside the codes"
    if any(t.packed_factors() is not None and packed_factors(t) is None for t in pairs):
        return "the factors of its low-rank term are in a format without a layout in strips"
    reason = reason_to_expand(weight)
    return None if reason is None else f"{reason} has no layout in strips"
