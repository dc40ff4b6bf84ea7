"""Capture: see every product with a weight while a block runs, whatever the architecture calls it.

A weight may be the parameter of a `Linear`, of GPT-2's `Conv1D`, or one slice of a 3-d tensor of experts. All of them end in one
of a few torch functions with the weight, or a view of it, as an argument, so that is where they are recognised: by the address of
the weight. Products that are given the same input share one set of statistics.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitpress.calibration.stats import Stats, StatsCollector
from bitpress.errors import CalibrationError

__all__ = ["Capture", "Watched"]

# function -> positions of input and weight among its arguments, and the weight's axis that meets the input
_FUNCTIONS: dict[Any, tuple[int, int, int]] = {
    torch.nn.functional.linear: (0, 1, -1),
    torch.addmm: (1, 2, -2),
    torch.mm: (0, 1, -2),
    torch.matmul: (0, 1, -2),
    torch.Tensor.matmul: (0, 1, -2),
    torch.Tensor.__matmul__: (0, 1, -2),
    torch.bmm: (0, 1, -2),
}


@dataclass(frozen=True)
class Watched:
    """A weight to look out for: its name, its 2-d view in memory, and whether that is [out, in] or [in, out]."""

    name: str
    view: torch.Tensor
    out_first: bool = True

    @property
    def in_features(self) -> int:
        return self.view.shape[1] if self.out_first else self.view.shape[0]


class Capture(TorchFunctionMode):
    """Collects statistics of every watched weight's input while active. Call `next_batch` between forwards."""

    def __init__(self, watched: Sequence[Watched], needs: Collection[str]) -> None:
        super().__init__()
        self._by_address = {w.view.data_ptr(): w for w in watched}
        self._needs = needs
        self._leader: dict[str, str] = {}
        self._collectors: dict[str, StatsCollector] = {}
        # Inputs of this forward and the groups that have counted them. Holding an input keeps its memory from being given
        # to another tensor, which would then look like the same input.
        self._seen: dict[tuple[int, tuple[int, int], int], tuple[torch.Tensor, list[str]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            at_x, at_w, axis = _FUNCTIONS[func]
            x, w = _argument(args, kwargs, at_x), _argument(args, kwargs, at_w)
            if isinstance(w, torch.Tensor) and isinstance(x, torch.Tensor) and w.data_ptr() in self._by_address:
                self._note(x, w, axis)
        return func(*args, **kwargs)

    def next_batch(self) -> None:
        """Forget the inputs of the forward that just ended."""
        self._seen.clear()

    def groups(self) -> list[list[str]]:
        """Give the names of weights that shared their input, in the order of first use."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def finish(self) -> dict[str, Stats]:
        """Give the statistics by weight; weights that share an input share the object. Unused weights are absent."""
        done = {leader: collector.finish() for leader, collector in self._collectors.items()}
        return {name: done[leader] for name, leader in self._leader.items()}

    def _note(self, x: torch.Tensor, w: torch.Tensor, axis: int) -> None:
        if w.ndim == 3:  # all experts in one batched product
            for e in range(w.shape[0]):
                self._note(x[e] if x.ndim == 3 else x, w[e], axis)
            return
        watched = self._by_address.get(w.data_ptr())
        if watched is None or w.ndim != 2 or x.numel() == 0:
            return
        if (w.stride(axis) == 1) != watched.out_first and min(w.shape) > 1:
            raise CalibrationError(f"{watched.name}: the weight is used in the other orientation than its module declares.")
        counted = self._seen.setdefault((x.data_ptr(), (x.numel(), x.shape[-1]), x._version), (x, []))[1]
        leader = self._leader.setdefault(watched.name, counted[0] if counted else watched.name)
        if leader not in counted:
            counted.append(leader)
            if leader not in self._collectors:
                self._collectors[leader] = StatsCollector(self._needs, watched.in_features)
            self._collectors[leader].add(x, watched.name)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> Any:
    # torch names the operands of a product (input, weight | other | mat2); positions are what models use.
    if len(args) > position:
        return args[position]
    names = ("input",) if position == 0 else ("weight", "other", "mat2")
    return next((kwargs[n] for n in names if n in kwargs), None)
