"""A model run without its weights: every parameter is a window into the same random numbers, and blocks may be replaced.

So a model of any size runs in the memory of its activations, which shows what its own code does between the blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["BREAKS", "Stop", "buffers_on_host", "hollow", "stand_ins"]

# What a model's own code may raise when its blocks return something else than it expects.
BREAKS = (TypeError, ValueError, IndexError, KeyError, RuntimeError, AttributeError, AssertionError)

# Rows of a matrix that a product takes at a time.
_ROWS = 8192


class Stop(Exception):
    """Ends a forward as soon as what was wanted has been seen."""

    def __init__(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.args_seen, self.kwargs_seen = args, dict(kwargs or {})


@contextmanager
def buffers_on_host(model: torch.nn.Module) -> Iterator[None]:
    """Let a model be tried on the host: buffers that are on another device come to the host, and go back."""
    away = [
        (module, leaf, value)
        for module in model.modules()
        for leaf, value in module._buffers.items()
        if value is not None and value.device.type != "cpu"
    ]
    try:
        for module, leaf, value in away:
            module._buffers[leaf] = value.cpu()
        yield
    finally:
        for module, leaf, value in away:
            module._buffers[leaf] = value


@contextmanager
def hollow(model: torch.nn.Module) -> Iterator[None]:
    """Put windows into one short row of random numbers where the parameters are; what was there comes back."""
    held = [
        (module, leaf, value) for module in model.modules() for leaf, value in module._parameters.items() if value is not None
    ]
    length = max((_reach(value.shape) for _, _, value in held), default=1)
    numbers = torch.randn(length, generator=torch.Generator().manual_seed(0))
    types = {value.dtype for _, _, value in held}
    rows = {dtype: (0.05 * numbers).to(dtype) for dtype in types}
    norms = {dtype: (1 + 0.1 * numbers).to(dtype) for dtype in types}
    try:
        for module, leaf, value in held:
            source = (rows if value.ndim > 1 else norms)[value.dtype]
            window = source.as_strided(value.shape, _steps(value.shape))
            module._parameters[leaf] = torch.nn.Parameter(window, requires_grad=False)
        with _InParts(), buffers_on_host(model):
            yield
    finally:
        for module, leaf, value in held:
            module._parameters[leaf] = value


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    """How far apart in the row neighbours along each axis are: 1 along the last, then primes, so that no two rows are alike."""
    return (503, 307, 101, 37, 1)[-len(shape) :] if len(shape) else ()


def _reach(shape: Sequence[int]) -> int:
    return 1 + sum(step * max(size - 1, 0) for step, size in zip(_steps(shape), shape, strict=True))


class _InParts(TorchFunctionMode):
    """Multiplies by a matrix some rows at a time: a product copies what overlaps, and a whole head is large."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and len(args) == 2 and not kwargs and args[1].shape[0] > _ROWS:
            return torch.cat([func(args[0], part) for part in args[1].split(_ROWS)], -1)
        return func(*args, **(kwargs or {}))


@contextmanager
def stand_ins(blocks: Iterable[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let blocks run other forwards."""
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
