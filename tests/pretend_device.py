"""A device that is not there: tensors that claim to be on it, and compute on the processor.

Whatever code runs on a GPU can be tried on it: a tensor of one axis or more that was left on the host is refused beside one on the device,
as CUDA refuses it, and so are a host's random generator, numpy, and products of integers, which CUDA does not have. Values are the processor's, so
a result must equal that of the references in torch to the bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "pretending"]

aten = torch.ops.aten
_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
# torch's gradient checkpoints ask the registered device for its autocast types, also where nothing runs on it.
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]

# Where CUDA takes tensors of the host: copies between devices, and whole numbers that say which entries are meant.
_CROSSING = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor: 0, aten.index_put.default: 0, aten.index_put_.default: 0, aten._index_put_impl_.default: 0}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.addmm_.default, aten.mv.default}


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Makes tensors of the device where they are asked for by `device=`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))


@contextmanager
def pretending() -> Iterator[torch.device]:
    """Let there be the device, with no native code for the host's part either, so that both are computed by the references."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Factories():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    asked = kwargs.get("device")
    made_there = bool(there) if asked is None else asked.type == DEVICE.type
    if there or made_there:
        _refuse(func, args, leaves, tensors, there)
    if asked is not None and made_there:
        kwargs["device"] = torch.device("cpu")
    if not there and not made_there:
        return func(*args, **kwargs)
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func is aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0]
    if func is aten._to_copy.default and asked is None:
        made_there = isinstance(args[0], OnDevice)
    return _returned(func, args, kwargs, out) if made_there else out


def _returned(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
    """Wrap results; an argument that was changed in its place is returned itself."""
    written = {id(_held(t)): t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, OnDevice)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return written[id(value)] if id(value) in written else OnDevice(value)

    return tree_map(wrap, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _refuse(func: Any, args: tuple[Any, ...], leaves: list[Any], tensors: list[torch.Tensor], there: list[OnDevice]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func}: Expected a 'pretend' device type for generator but found 'cpu'")
    if func in _CROSSING:
        return
    strays = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0]
    if func in _INDEXING and isinstance(args[0], OnDevice):
        indices = [t for t in args[1] if t is not None]
        strays = [t for t in strays if not any(t is index for index in indices)]
    if strays:
        raise RuntimeError(f"{func}: a tensor of the host, {list(strays[0].shape)}, beside one of the device")
    if func in _PRODUCTS and there and not there[0].is_floating_point():
        raise RuntimeError(f"{func}: CUDA has no product of {there[0].dtype}")
