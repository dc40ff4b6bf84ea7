"""The arithmetic in which this processor is fast."""

import platform

import torch

__all__ = ["has_fast_bf16"]


def has_fast_bf16() -> bool:
    """Return whether products of bf16 matrices are faster than those of float32.

    On x86 that needs matrix tiles (AMX): without them torch multiplies bf16 by AVX-512 instructions, or widens every value, and exact
    float32 is faster. Other processors are trusted if they report such products.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
