"""The trace behind `residual` and `value_heads`: a model without weights runs once, and every function says what it does to axes.

A value's last axis is followed (`axis_rules`). As in `uses`, products are answered with random numbers, so no weight is read.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bitpress.errors import CheckpointError
from bitpress.exhaustion import is_out_of_memory
from bitpress.models.axis_facts import Facts, storage_of
from bitpress.models.axis_rules import Rule
from bitpress.models.hollow import BREAKS
from bitpress.models.task import Task
from bitpress.models.uses import as_meta, tensors_in, weightless, written_argument

__all__ = ["AxisTrace"]

_LENGTH = 5


class AxisTrace(TorchDispatchMode):
    """One run of a model; `blocks` holds the nodes of what its blocks are given, None where that is not known."""

    def __init__(self, model: torch.nn.Module, task: Task, blocks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.blocks: list[int | None] = []
        self.known = Facts({name: tuple(p.shape) for name, p in model.named_parameters()})
        self.model, self._task, self._stack = model, task, blocks
        self._random = torch.Generator().manual_seed(0)
        self._path: list[str] = []

    def run(self) -> torch.Tensor:
        """Run the model and return what it says. Raises CheckpointError when its code cannot be run on a short input."""
        config: Any = self.model.config
        inputs = self._task.trial(config, 1, _LENGTH)
        hooks = []
        for path, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            with weightless(self.model) as parameters, torch.no_grad():
                self.known.names = {storage_of(p): name for name, p in parameters.items()}
                with self:
                    return self._task.forward(self.model, inputs)
        except BREAKS as error:
            if is_out_of_memory(error):
                raise
            what = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{type(self.model).__name__}: its code does not run on short inputs: {what}") from error
        finally:
            for hook in hooks:
                hook.remove()

    def draw(self, count: int) -> torch.Tensor:
        """Return random numbers from -1 to 1, no two of them equal."""
        jitter = torch.rand(count, generator=self._random, dtype=torch.float64)
        return ((torch.randperm(count, generator=self._random) + 0.9 * jitter) * (2 / count) - 1).float()

    def _enter(self, path: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._path.append(path)
        self.known.where = path or type(self.model).__name__
        if any(module is block for block in self._stack):
            # With several streams, or inputs of every layer beside them, none of the tensors is the one stream.
            given = [t for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point()]
            fact = self.known.of(given[0]) if given else None
            self.blocks.append(None if fact is None else fact.node)

    def _leave(self, *_: Any) -> None:
        self._path.pop()
        self.known.where = (self._path or [""])[-1] or type(self.model).__name__

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        weights = [t for t in tensors if t.is_meta]
        if weights and len(weights) == len(tensors):
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            return func(*args, **kwargs)  # a view of a parameter is known by its storage
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        facts = {id(t): self.known.of(t) for t in tensors}  # before a function writes into its operand
        if not weights:
            out = func(*args, **kwargs)
        elif (out := written_argument(func, args, kwargs)) is None or out.is_meta:
            out = tree_map(self._answer, func(*tree_map(as_meta, args), **tree_map(as_meta, kwargs)))
        Rule(self.known, func, args, kwargs, out, facts).apply()
        return out

    def _answer(self, shape: Any) -> Any:
        if not isinstance(shape, torch.Tensor):
            return shape
        if not shape.is_floating_point():
            return torch.zeros(shape.shape, dtype=shape.dtype)
        # The same for every token, as in `uses`.
        last = shape.shape[-1] if shape.ndim else 1
        return self.draw(last).to(shape.dtype).expand(shape.shape).contiguous()
