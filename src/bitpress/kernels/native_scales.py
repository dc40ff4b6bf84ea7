"""Scales in native memory: as a file stores them, with the values that many of them share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bitpress.formats.double_quantized import dynamic_map
from bitpress.formats.layouts.dense import unpack
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scales import IntegerCodes
from bitpress.formats.terms.packed import Packed

__all__ = ["NativeScales", "native_floats", "native_scales"]


@dataclass(frozen=True)
class NativeScales:
    """Scales `[down, across]` as native code takes them: a kind, whole bytes each, a factor of all, and what they share."""

    kind: str
    values: np.ndarray
    gain: float = 1.0
    shared: dict[str, Any] | None = field(default=None)


def native_scales(term: Packed, plane: int = 0, planes: int = 1, name: str = "scale") -> NativeScales:
    """Return the scales of a term, or of one plane of several; `name` is the parameter."""
    fmt = term.format
    down, across = fmt.block_grid(term.shape)
    if not any(p.kind == "scale" for p in fmt.grid.params):
        return NativeScales("e8m0", np.full((down, across), 127, np.uint8))
    made = (_runs if isinstance(fmt.store, RunCodes) else STORES[fmt.scale])(term, name, down, across * planes)
    each = made.values.reshape(down, across, planes, -1)[:, :, plane]
    # Factors of dq and of runs are those of the scales of all planes side by side.
    by_planes = made.kind == "dq" or isinstance(fmt.store, RunCodes)
    shared = {**(made.shared or {}), "planes": planes, "plane": plane} if by_planes else made.shared
    return NativeScales(made.kind, np.ascontiguousarray(each).reshape(down, -1), made.gain, shared)


def native_floats(term: Packed, name: str) -> NativeScales:
    """Return a parameter of one float a block, as scales are."""
    stored = term.tensors[name]
    kind = "fp16" if stored.dtype == torch.float16 else "fp32"
    return NativeScales(kind, _as_bytes(stored, term.format.block_grid(term.shape)[0]))


def _plain(term: Packed, name: str, down: int, across: int) -> NativeScales:
    return NativeScales(term.format.scale, _as_bytes(term.tensors[name], down))


def _e8m0(term: Packed, name: str, down: int, across: int) -> NativeScales:
    return NativeScales("e8m0", _as_bytes(term.tensors[name], down))


def _fp8(term: Packed, name: str, down: int, across: int) -> NativeScales:
    return NativeScales("fp8", _as_bytes(term.tensors[name], down), float(term.tensors[f"{name}_tensor"]))


def _fp8_over(term: Packed, name: str, down: int, across: int) -> NativeScales:
    # Multiplied by the inverse, where the format divides: a last digit of float32 may differ.
    divisor = float(term.tensors[f"{name}_tensor"])
    return NativeScales("fp8", _as_bytes(term.tensors[name], down), 1.0 / divisor if divisor else 0.0)


def _by_row(term: Packed, name: str, down: int, across: int) -> NativeScales:
    store = term.format.store
    bits = store.bits if isinstance(store, IntegerCodes) else 4
    codes = unpack(term.tensors[name], bits, across)
    return NativeScales(term.format.scale, _as_bytes(codes, down), 1.0, {"rows": _flat(term.tensors[f"{name}_row"])})


def _double_quantized(term: Packed, name: str, down: int, across: int) -> NativeScales:
    shared = {
        "levels": _flat(dynamic_map()),
        "factors": _flat(term.tensors[f"{name}_block"]),
        "offset": float(term.tensors[f"{name}_offset"]),
    }
    return NativeScales("dq", _as_bytes(term.tensors[name], down), 1.0, shared)


def _runs(term: Packed, name: str, down: int, across: int) -> NativeScales:
    store = term.format.store
    assert isinstance(store, RunCodes)
    factors = term.tensors[f"{name}_run"].contiguous().view(torch.uint16).flatten().numpy()
    shared = {"run": store.run, "offset": -float(store.offset), "factors": factors}
    return NativeScales(f"run{store.bits}", _as_bytes(unpack(term.tensors[name], store.bits, across), down), 1.0, shared)


# Every scale store but those of runs, by name.
STORES: dict[str, Callable[[Packed, str, int, int], NativeScales]] = {
    "fp16": _plain,
    "bf16": _plain,
    "fp32": _plain,
    "e8m0": _e8m0,
    "fp8": _fp8,
    "fp8over": _fp8_over,
    "s4": _by_row,
    "s6": _by_row,
    "s8": _by_row,
    "p2row": _by_row,
    "dq": _double_quantized,
}


def _as_bytes(scales: torch.Tensor, down: int) -> np.ndarray:
    # A single scale of several planes counts as contiguous whatever its stride, which the view refuses.
    made: np.ndarray = (
        scales.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).reshape(down, -1).numpy()
    )
    return made


def _flat(values: torch.Tensor) -> np.ndarray:
    made: np.ndarray = values.float().contiguous().flatten().numpy()
    return made
