"""The native product: reads the codes as they are stored, in strips that are laid out at a weight's first product.

Inputs stay in float, so results are the reference's up to rounding. The strips live as long as the weight, beside its own tensors.
"""

import atexit
import functools
import os
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.formats import CompressedWeight
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.sparse import Sparse
from bitpress.kernels.native_layout import NativeLayout, lay_out, reason_to_expand
from bitpress.kernels.reference import Reference

__all__ = ["Native"]

ROWS = 1 << 16  # of x at once
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass
class _Held:
    refusal: str | None
    strips: NativeLayout | None = None


# By the weight's identity: weights hold tensors and have no hash.
_held: dict[int, _Held] = {}


class Native:
    name: ClassVar[str] = "native"

    @staticmethod
    def refuses(weight: CompressedWeight, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"x is on {device.type}, not on the CPU"
        if not native.available():
            return "the native library is not there"
        return _hold(weight).refusal

    @staticmethod
    def matmul(x: Float[torch.Tensor, "*batch in"], weight: CompressedWeight) -> Float[torch.Tensor, "*batch out"]:
        if x.dtype == torch.float64 or (x.requires_grad and torch.is_grad_enabled()):
            return Reference.matmul(x, weight)
        held = _hold(weight)
        if held.strips is None:
            held.strips = lay_out(weight)
        rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], weight.shape[0])
        multiplier = _multiplier(torch.get_num_threads(), native.chosen_path(), os.getpid())
        for start in range(0, rows.shape[0], ROWS):
            part = slice(start, start + ROWS)
            multiplier.multiply(held.strips.linear, rows[part].numpy(), y[part].numpy(), False)
        return y.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)


@functools.cache
def _multiplier(threads: int, path: str, process: int) -> Any:
    """Give the product with threads of its own; a forked process has none of its parent's."""
    return native.library().Multiplier(threads, path)


# nanobind complains of objects that outlive the interpreter, as those of a model in a global variable would.
atexit.register(_multiplier.cache_clear)
atexit.register(_held.clear)


def _hold(weight: CompressedWeight) -> _Held:
    key = id(weight)
    if key not in _held:
        _held[key] = _Held(_refusal(weight))
        weakref.finalize(weight, _held.pop, key, None).atexit = False
    return _held[key]


def _refusal(weight: CompressedWeight) -> str | None:
    """Refuse what strips would round: that is for an engine that says so, not for a kernel in the reference's place."""
    pairs = [term for term in weight.terms if isinstance(term, LowRank)]
    if len(pairs) > 1 or sum(isinstance(term, Sparse) for term in weight.terms) > 1:
        return "it has several terms of one kind beside the codes"
    if any(tensor.dtype not in SIXTEEN_BITS for term in pairs for tensor in term.tensors.values()):
        return "the factors of its low-rank term are packed"
    reason = reason_to_expand(weight)
    return None if reason is None else f"{reason} has no layout in strips"
