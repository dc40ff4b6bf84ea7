"""Scales proposed by a quantizer, as the format would store them."""

import torch
from jaxtyping import Float

from bitpress.errors import NumericsError
from bitpress.formats import Format, Params
from bitpress.formats.scale_store import shared_name

__all__ = ["stored_scales", "stored_zeros"]


def stored_scales(fmt: Format, params: Params, scale: Float[torch.Tensor, "down across"]) -> Float[torch.Tensor, "down across"]:
    """Round scales to storable values, given the parameters that they share; return those of `params` if that is impossible.

    A scale must be finite and above 0. If one is beyond the range of the store, all scales of `params` are returned.
    """
    old = params["scale"]
    outer = {part: params[shared_name("scale", part)] for part in fmt.store.expected(1, 1) if part}
    try:
        return fmt.store.round(torch.where((scale > 0) & torch.isfinite(scale), scale, old), outer)
    except NumericsError:
        return old


def stored_zeros(fmt: Format, zero: Float[torch.Tensor, "down across"]) -> Float[torch.Tensor, "down across"]:
    """Return the nearest zero points that a format stores: codes, or floats up to as far beyond the codes as there are codes."""
    if fmt.variant == "zero":
        return zero.round().clamp(0, fmt.grid.num_codes - 1)
    zero = zero.clamp(-fmt.grid.num_codes, 2 * fmt.grid.num_codes)
    return zero if fmt.variant == "zerofp32" else zero.half().float()
