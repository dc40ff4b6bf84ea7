"""The native library, where it could be built: typed doors to it, and whether it is there.

Every function has a reference in torch that says what it computes; callers use that where `available()` is False. Tensors are
on the CPU and contiguous; results do not depend on the number of threads.
"""

import functools
import importlib
from types import ModuleType

import torch
from jaxtyping import Float, Int, UInt8

from bitpress.errors import KernelUnavailable
from bitpress.settings import use_native

__all__ = ["add_gram_", "available", "features", "gram_size", "round_columns_"]


@functools.cache
def _find_library() -> ModuleType | None:
    try:
        return importlib.import_module("bitpress._native")
    except ImportError:
        return None


def _library() -> ModuleType:
    library = _find_library()
    if library is None:
        raise KernelUnavailable(
            "the native library was not built: install a C++ compiler and Python's headers, then bitpress again."
        )
    return library


def available() -> bool:
    """Say whether native code is there and wanted."""
    return use_native() and _find_library() is not None


def features() -> frozenset[str]:
    """Name what this processor offers to native code ("avx512", "amx-bf16"); empty without it."""
    return frozenset(_library().features()) if available() else frozenset()


def round_columns_(
    w: Float[torch.Tensor, "cols rows"],
    factor: Float[torch.Tensor, "cols cols"],
    scale: Float[torch.Tensor, "groups rows"],
    zero: Float[torch.Tensor, "groups rows"] | float,
    top: int,
    group: Int[torch.Tensor, " cols"],
) -> tuple[UInt8[torch.Tensor, "cols rows"], Float[torch.Tensor, "cols rows"]]:
    """Round columns in order, each error fed to the columns after it in `w`; give codes and errors.

    Levels are `(code - zero) * scale`, codes 0 to `top`; `group` names each column's row of parameters.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8)
    errors = torch.empty_like(w)
    stored, constant = (zero, 0.0) if isinstance(zero, torch.Tensor) else (None, float(zero))
    _library().round_columns(w, codes, errors, factor, scale, stored, constant, top, group, torch.get_num_threads())
    return codes, errors


def gram_size(in_features: int) -> int:
    """Rows and columns of the buffer that `add_gram_` needs: whole tiles of 32."""
    return -(-in_features // 32) * 32


def add_gram_(gram: Float[torch.Tensor, "padded padded"], x: torch.Tensor) -> None:
    """Add x.T @ x on and above the diagonal; `x` is bf16 `[tokens, in]`. What is below the diagonal is undefined."""
    _library().add_gram(gram, x.view(torch.int16), torch.get_num_threads())
