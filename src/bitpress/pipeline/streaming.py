"""Streaming: run a model block by block, with one block's weights in memory.

The model's own code does everything outside the blocks. Its blocks are told to step aside (`forward` replaced on the instance):
once to learn what the model passes to each of them, and later to feed stored hidden states into the norm and the head. So nothing
here depends on an architecture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int

from bitpress.errors import CheckpointError
from bitpress.pipeline.uses import Use, find_uses
from bitpress.runtime.skeleton import build_skeleton, find_stack, restore_ties_, set_parameter_

__all__ = ["ParameterLoader", "StreamedModel"]


class ParameterLoader(Protocol):
    """Where parameters come from: an original checkpoint, or a compressed one decoded on the way."""

    def load(self, prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        """Give every parameter and buffer whose name begins with `prefix` but not with `exclude`."""
        ...


class _Stop(Exception):
    """Ends a forward as soon as what was wanted has been seen."""

    def __init__(self, hidden: torch.Tensor | None = None) -> None:
        super().__init__()
        self.hidden = hidden


class StreamedModel:
    """A skeleton with its outer parts loaded; blocks come and go."""

    def __init__(self, config: Any, loader: ParameterLoader | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._loader = loader
        self.model = build_skeleton(config, dtype)
        self.stack, self.blocks = find_stack(self.model)
        self._arguments: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._wraps_in_tuple: bool | None = None

    @property
    def loader(self) -> ParameterLoader:
        if self._loader is None:
            raise CheckpointError("this model has no source of parameters.")
        return self._loader

    @loader.setter
    def loader(self, loader: ParameterLoader) -> None:
        self._loader = loader

    @cached_property
    def uses(self) -> dict[str, Use]:
        """What the model does with each of its matrices."""
        return find_uses(self.model)

    def block_name(self, i: int) -> str:
        return f"{self.stack}.{i}"

    def load_outer_(self) -> dict[str, torch.Tensor]:
        """Load everything that is in no block (embeddings, norms, head) and give it as stored."""
        tensors = self.loader.load("", exclude=f"{self.stack}.")
        self.fill_(tensors)
        restore_ties_(self.model)
        return tensors

    def drop_outer_(self) -> None:
        """Give the memory of everything outside the blocks back."""
        for name, value in list(self.model.named_parameters()):
            if not name.startswith(f"{self.stack}."):
                set_parameter_(self.model, name, torch.empty_like(value, device="meta"))

    def load_block_(self, i: int) -> dict[str, torch.Tensor]:
        """Load one block and give its tensors as stored."""
        tensors = self.loader.load(f"{self.block_name(i)}.")
        self.fill_(tensors)
        return tensors

    def fill_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set parameters, floating ones in the type that the model computes in."""
        for name, value in tensors.items():
            set_parameter_(self.model, name, value.to(self.dtype) if value.is_floating_point() else value)

    def drop_block_(self, i: int) -> None:
        """Give the block's memory back."""
        for name, value in list(self.blocks[i].named_parameters()):
            set_parameter_(self.blocks[i], name, torch.empty_like(value, device="meta"))

    @torch.no_grad()
    def embed(self, tokens: Int[torch.Tensor, "batch length"]) -> Float[torch.Tensor, "batch length hidden"]:
        """Give the first block's input, and note what the model passes to every block for this shape."""
        shape = (tokens.shape[0], tokens.shape[1])

        def stop(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise _Stop(hidden)

        with self._stand_ins([stop] + [_never] * (len(self.blocks) - 1)):
            hidden = self._until_stop(tokens)
        if shape not in self._arguments:
            self._arguments[shape] = self._learn_arguments(tokens)
            # What depends on the text would be wrong for the next batch: ask again with other tokens and compare.
            again = self._learn_arguments(tokens.flip(1))
            if not _same(self._arguments[shape], again):
                raise CheckpointError(
                    f"{type(self.model).__name__} passes its blocks inputs that depend on the text; it cannot be streamed."
                )
        return hidden

    @torch.no_grad()
    def run_block(
        self, i: int, hidden: Float[torch.Tensor, "batch length hidden"]
    ) -> Float[torch.Tensor, "batch length hidden"]:
        """Run one loaded block on hidden states of a shape that `embed` has seen."""
        return self._run_block(i, hidden)

    def _run_block(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._arguments[(hidden.shape[0], hidden.shape[1])][i]
        out = self.blocks[i](hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def logits(
        self, tokens: Int[torch.Tensor, "batch length"], hidden: Float[torch.Tensor, "batch length hidden"]
    ) -> Float[torch.Tensor, "batch length vocabulary"]:
        """Give the logits that follow from the last block's output."""
        return self._logits(tokens, hidden)

    def loss_gradient(
        self, tokens: Int[torch.Tensor, "batch length"], hidden: Float[torch.Tensor, "batch length hidden"]
    ) -> Float[torch.Tensor, "batch length hidden"]:
        """Give the gradient of the mean next-token loss by the last block's output."""
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = self._logits(tokens, leaf)[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    def block_gradients(
        self,
        i: int,
        hidden: Float[torch.Tensor, "batch length hidden"],
        gradient: Float[torch.Tensor, "batch length hidden"],
        parameters: Sequence[str],
    ) -> tuple[Float[torch.Tensor, "batch length hidden"], list[torch.Tensor]]:
        """Run a loaded block again and give the loss's gradients by its input and by parameters, from that by its output."""
        leaves = [self.model.get_parameter(name) for name in parameters]
        for leaf in leaves:
            leaf.requires_grad_(True)
        try:
            with torch.enable_grad():
                start = hidden.detach().requires_grad_()
                out = self._run_block(i, start)
                by_input, *found = torch.autograd.grad(out, [start, *leaves], gradient, allow_unused=True)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        given = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        return by_input, given

    def _logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        def replace(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._wraps_in_tuple else hidden

        def keep(given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (given,) if self._wraps_in_tuple else given

        with self._stand_ins([keep] * (len(self.blocks) - 1) + [replace]):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
            return logits

    def _until_stop(self, tokens: torch.Tensor) -> torch.Tensor:
        try:
            self.model(input_ids=tokens, use_cache=False)
        except _Stop as stop:
            if stop.hidden is not None:
                return stop.hidden
        raise CheckpointError(f"{type(self.model).__name__} does not run its blocks at {self.stack} in order.")

    def _learn_arguments(self, tokens: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if self._wraps_in_tuple is None:
            self._wraps_in_tuple = self._learn_wrapping(tokens[:1, :4])
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            if len(seen) == len(self.blocks):
                raise _Stop(hidden)
            return (hidden,) if self._wraps_in_tuple else hidden

        with self._stand_ins([note] * len(self.blocks)):
            self._until_stop(tokens)
        return seen

    def _learn_wrapping(self, tokens: torch.Tensor) -> bool:
        """Find out whether the model expects a block to return its hidden states alone or first in a tuple."""
        for wrap in (False, True):

            def step_aside(hidden: torch.Tensor, *args: Any, _wrap: bool = wrap, **kwargs: Any) -> Any:
                return (hidden,) if _wrap else hidden

            with self._stand_ins([step_aside] * len(self.blocks)):
                try:
                    logits = self.model(input_ids=tokens, use_cache=False).logits
                except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
                    continue
            if tuple(logits.shape[:2]) == tuple(tokens.shape):
                return wrap
        raise CheckpointError(f"{type(self.model).__name__}: its blocks return neither hidden states nor a tuple of them.")

    @contextmanager
    def _stand_ins(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        try:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.forward = forward
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def _never(*args: Any, **kwargs: Any) -> Any:
    raise CheckpointError("a block ran before the first one.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    return True
