"""Which arithmetic this processor is fast at."""

import platform

import torch

__all__ = ["has_fast_bf16"]


def has_fast_bf16() -> bool:
    """Say whether products of bf16 matrices are faster than those of float32.

    On x86 that takes matrix tiles (AMX): without them torch multiplies bf16 by AVX-512 instructions, or widens every value, and float32,
    which is exact, is the faster of the two as well. Other processors are believed where they say that they have such products.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
