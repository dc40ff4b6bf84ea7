"""What goes from block to block where that is more than hidden states: several streams, keys and values that later blocks use again.

All of it is one tensor, the state [batch, length, width]: the columns of a token are its values in everything that the last block
returned and in everything that blocks have put into a mapping they share, then the number of the token itself. What the model makes of
the text (embeddings of every layer, masks) and what it does between blocks is its own code, run again for every block: the blocks before
stand aside and return what the state says. A part of a state, fewer texts or their first tokens, is a state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import CheckpointError
from bitpress.models.hollow import Stop, stand_ins
from bitpress.models.task import Task

__all__ = ["Carried", "Columns", "Shared", "argument_of", "filled", "formed", "tensors_of"]

_DIGITS = 3  # of a token's number, in base 256: whole numbers up to 256 are exact in every floating type


@dataclass(frozen=True)
class Columns:
    """How a tensor with one axis of texts and one of tokens becomes columns."""

    text: int
    token: int
    rest: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return int(torch.Size(self.rest).numel())

    def pack(self, value: torch.Tensor) -> torch.Tensor:
        moved = value.movedim((self.text, self.token), (0, 1))
        return moved.reshape(*moved.shape[:2], self.width)

    def unpack(self, columns: torch.Tensor) -> torch.Tensor:
        moved = columns.reshape(*columns.shape[:2], *self.rest).to(self.dtype)
        return moved.movedim((0, 1), (self.text, self.token))


@dataclass(frozen=True)
class Shared:
    """An entry of a mapping that blocks share: the argument, the key, its form, and the first block that writes it."""

    argument: int | str
    key: Any
    form: Any
    columns: tuple[Columns, ...]
    since: int


@dataclass(frozen=True)
class Carried:
    """The layout of a model's state. `form` is what a block returns; of its tensors those without columns are not carried."""

    task: Task
    form: Any
    outputs: tuple[Columns | None, ...]
    shared: tuple[Shared, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return sum(c.width for c in self._columns()) + _DIGITS

    @property
    def value_columns(self) -> int:
        """The columns that are values; those after them number the tokens."""
        return self.width - _DIGITS

    @property
    def plain_width(self) -> int:
        """The width of the hidden states that blocks return, where nothing else is carried."""
        return self._columns()[0].width

    @property
    def is_plain(self) -> bool:
        """Whether blocks return hidden states [batch, length, hidden], alone or in a tuple, and nothing is carried beside them."""
        hidden = self.outputs[0]
        alone = self.form is _HERE or (isinstance(self.form, (list, tuple)) and len(self.form) == 1)
        plain = hidden is not None and (hidden.text, hidden.token, len(hidden.rest)) == (0, 1, 1)
        return alone and plain and not self.shared

    def begin(self, tokens: Int[torch.Tensor, "batch length"]) -> Float[torch.Tensor, "batch length width"]:
        """Return the state before the first block: nothing but the text."""
        empty = torch.zeros(*tokens.shape, self.width - _DIGITS, dtype=self.dtype, device=tokens.device)
        return torch.cat([empty, self._digits(tokens)], -1)

    def tokens(self, state: Float[torch.Tensor, "batch length width"]) -> Int[torch.Tensor, "batch length"]:
        powers = 256 ** torch.arange(_DIGITS, device=state.device)
        return (state[..., -_DIGITS:].detach().long() * powers).sum(-1)

    def run(
        self, model: Any, blocks: torch.nn.ModuleList, i: int, state: Float[torch.Tensor, "batch length width"]
    ) -> Float[torch.Tensor, "batch length width"]:
        """Run a loaded block on the state before it and return the state after it."""
        args, kwargs = self.arguments(model, blocks, i, state)
        out = blocks[i](*args, **kwargs)
        return self.after(
            out, {s.argument: dict(argument_of(args, kwargs, s.argument)) for s in self.shared}, self.tokens(state)
        )

    def arguments(
        self, model: Any, blocks: torch.nn.ModuleList, i: int, state: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the model's code gives block `i`, from the state after the block before it."""

        def take(*args: Any, **kwargs: Any) -> Any:
            raise Stop(args, kwargs)

        with stand_ins(blocks, [self.stand_in(state, i)] * i + [take] * (len(blocks) - i)):
            try:
                self.task.forward(model, self.tokens(state))
            except Stop as stop:
                return stop.args_seen, stop.kwargs_seen
        raise CheckpointError(f"{type(model).__name__} did not run its blocks.")

    def finish(self, model: Any, blocks: torch.nn.ModuleList, tokens: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the outputs that follow from the state after the last block."""
        with stand_ins(blocks, [self.stand_in(state, len(blocks))] * len(blocks)):
            return self.task.forward(model, tokens)

    def stand_in(self, state: torch.Tensor, i: int) -> Callable[..., Any]:
        """Return a forward for the blocks before block `i`: it leaves in shared mappings, and returns, what the state says."""
        columns = self._columns()
        parts = state[..., :-_DIGITS].split([c.width for c in columns], -1)
        values = iter([c.unpack(part) for c, part in zip(columns, parts, strict=True)])
        outputs = [None if c is None else next(values) for c in self.outputs]
        shared = [(entry, filled(entry.form, values)) for entry in self.shared]

        def forward(*args: Any, **kwargs: Any) -> Any:
            for entry, value in shared:
                if entry.since < i:
                    argument_of(args, kwargs, entry.argument)[entry.key] = value
            return filled(self.form, iter(outputs))

        return forward

    def after(self, out: Any, mappings: Mapping[int | str, Mapping[Any, Any]], tokens: torch.Tensor) -> torch.Tensor:
        """Return the state of what a block returned and what is in the mappings then."""
        leaves = tensors_of(out)
        parts = [c.pack(leaf) for c, leaf in zip(self.outputs, leaves, strict=True) if c is not None]
        for entry in self.shared:
            value = mappings[entry.argument].get(entry.key)
            if value is None:
                parts += [tokens.new_zeros(*tokens.shape, c.width, dtype=self.dtype) for c in entry.columns]
            else:
                parts += [c.pack(leaf) for c, leaf in zip(entry.columns, tensors_of(value), strict=True)]
        return torch.cat([part.to(self.dtype) for part in parts] + [self._digits(tokens)], -1)

    def _columns(self) -> list[Columns]:
        return [c for c in self.outputs if c is not None] + [c for entry in self.shared for c in entry.columns]

    def _digits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens // 256**k % 256 for k in range(_DIGITS)], -1).to(self.dtype)


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any], name: int | str) -> Any:
    return args[name] if isinstance(name, int) else kwargs[name]


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in tensors_of(part)]
    return [value] if isinstance(value, torch.Tensor) else []


_HERE = "a tensor"


def formed(value: Any) -> Any:
    """A value with a mark where its tensors are."""
    if isinstance(value, (list, tuple)):
        return _like(value, [formed(part) for part in value])
    return _HERE if isinstance(value, torch.Tensor) else value


def filled(form: Any, values: Iterator[Any]) -> Any:
    if isinstance(form, (list, tuple)):
        return _like(form, [filled(part, values) for part in form])
    return next(values) if form is _HERE else form


def _like(value: Any, parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
