"""What goes from block to block where that is more than hidden states: several streams, keys and values that later blocks use again.

All of it is one tensor, the state [batch, length, width]: the columns of a token are its values in everything that the last block
returned and in everything that blocks have put into a mapping they share, then the number of the token itself. What the model makes of
the text (embeddings of every layer, masks) and what it does between blocks is its own code, run again for every block: the blocks before
stand aside and return what the state says. A part of a state, fewer texts or their first tokens, is a state.

What there is to carry is found by running the model once without its weights: every parameter is a window into the same random numbers.
That run also shows whether the state is enough: from it each block, and the head, must be given what the blocks themselves gave.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int
from torch.overrides import TorchFunctionMode

from bitpress.errors import CheckpointError
from bitpress.exhaustion import is_out_of_memory
from bitpress.models.skeleton import find_stacks
from bitpress.models.task import Task

__all__ = ["BREAKS", "Carried", "Stop", "choose_stack", "find_carried", "hollow", "stand_ins"]

# What a model's own code may raise when its blocks return something else than it expects.
BREAKS = (TypeError, ValueError, IndexError, KeyError, RuntimeError, AttributeError, AssertionError)

# Two shapes that no other size of a model follows: from one to the other, axes of texts and of tokens change, and those alone.
_SHAPES = ((2, 5), (3, 7))
_ROWS = 8192
_DIGITS = 3  # of a token's number, in base 256: whole numbers up to 256 are exact in every floating type


class Stop(Exception):
    """Ends a forward as soon as what was wanted has been seen."""

    def __init__(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.args_seen, self.kwargs_seen = args, dict(kwargs or {})


@dataclass(frozen=True)
class _Columns:
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
class _Shared:
    """An entry of a mapping that blocks share: the argument, the key, its form, and the first block that writes it."""

    argument: int | str
    key: Any
    form: Any
    columns: tuple[_Columns, ...]
    since: int


@dataclass
class _Call:
    """One block's part in a forward; mappings as they were before and after."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    after: dict[int | str, dict[Any, Any]]


@dataclass(frozen=True)
class Carried:
    """The layout of a model's state. `form` is what a block returns; of its tensors those without columns are not carried."""

    task: Task
    form: Any
    outputs: tuple[_Columns | None, ...]
    shared: tuple[_Shared, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return sum(c.width for c in self._columns()) + _DIGITS

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
        empty = torch.zeros(*tokens.shape, self.width - _DIGITS, dtype=self.dtype)
        return torch.cat([empty, self._digits(tokens)], -1)

    def tokens(self, state: Float[torch.Tensor, "batch length width"]) -> Int[torch.Tensor, "batch length"]:
        powers = 256 ** torch.arange(_DIGITS)
        return (state[..., -_DIGITS:].detach().long() * powers).sum(-1)

    def run(
        self, model: Any, blocks: torch.nn.ModuleList, i: int, state: Float[torch.Tensor, "batch length width"]
    ) -> Float[torch.Tensor, "batch length width"]:
        """Run a loaded block on the state before it and return the state after it."""
        args, kwargs = self.arguments(model, blocks, i, state)
        out = blocks[i](*args, **kwargs)
        return self.after(out, {s.argument: dict(_argument(args, kwargs, s.argument)) for s in self.shared}, self.tokens(state))

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
        shared = [(entry, _filled(entry.form, values)) for entry in self.shared]

        def forward(*args: Any, **kwargs: Any) -> Any:
            for entry, value in shared:
                if entry.since < i:
                    _argument(args, kwargs, entry.argument)[entry.key] = value
            return _filled(self.form, iter(outputs))

        return forward

    def after(self, out: Any, mappings: Mapping[int | str, Mapping[Any, Any]], tokens: torch.Tensor) -> torch.Tensor:
        """Return the state of what a block returned and what is in the mappings then."""
        leaves = _tensors(out)
        parts = [c.pack(leaf) for c, leaf in zip(self.outputs, leaves, strict=True) if c is not None]
        for entry in self.shared:
            value = mappings[entry.argument].get(entry.key)
            if value is None:
                parts += [torch.zeros(*tokens.shape, c.width, dtype=self.dtype) for c in entry.columns]
            else:
                parts += [c.pack(leaf) for c, leaf in zip(entry.columns, _tensors(value), strict=True)]
        return torch.cat([part.to(self.dtype) for part in parts] + [self._digits(tokens)], -1)

    def _columns(self) -> list[_Columns]:
        return [c for c in self.outputs if c is not None] + [c for entry in self.shared for c in entry.columns]

    def _digits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens // 256**k % 256 for k in range(_DIGITS)], -1).to(self.dtype)


def choose_stack(model: Any, task: Task) -> tuple[str, torch.nn.ModuleList]:
    """Return the list of blocks that the task's inputs run through: of several large ones, some are towers for other inputs."""
    stacks = find_stacks(model)
    ran: set[int] = set()

    def noting(k: int, block: torch.nn.Module) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ran.add(k)
            if k == 0:  # the largest, which is the right one nearly always: no more is to be known
                raise Stop
            return own(*args, **kwargs)

        return forward

    if len(stacks) > 1:
        every = [(k, block) for k, (_, stack) in enumerate(stacks) for block in stack]
        noted = [noting(k, block) for k, block in every]
        with torch.no_grad(), hollow(model), stand_ins([block for _, block in every], noted), suppress(Stop, *BREAKS):
            task.forward(model, task.trial(model.config, *_SHAPES[0]))
    return stacks[min(ran, default=0)]


def find_carried(model: Any, task: Task, blocks: torch.nn.ModuleList, dtype: torch.dtype) -> Carried:
    """Find what a model carries from block to block. Raises CheckpointError where its blocks cannot be run one by one."""
    name = type(model).__name__
    if not task.reads_tokens:
        raise CheckpointError(
            f"{name} gives its blocks more than hidden states; as {task.title} it cannot be run block by block."
        )
    with torch.no_grad(), hollow(model):
        try:
            (small, logits), (large, _) = (_walk(model, task, blocks, shape) for shape in _SHAPES)
        except CheckpointError:
            raise
        except BREAKS as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{name} cannot be run block by block: {' '.join(str(error).split())[:200]}") from error
        forms = {repr(_formed(call.out)) for call in small}
        first = _columns_of(small[0].out, large[0].out)
        if len(forms) > 1 or any(_columns_of(a.out, b.out) != first for a, b in zip(small, large, strict=True)):
            raise CheckpointError(f"{name}: its blocks return different things; they cannot be run one by one.")
        if not first or first[0] is None:
            raise CheckpointError(f"{name}: its blocks do not work on one vector a token; they cannot be run one by one.")
        shared = _shared_of(small, large, name)
        types = [c.dtype for c in (*first, *(c for entry in shared for c in entry.columns)) if c is not None]
        for other in types:
            dtype = torch.promote_types(dtype, other)
        carried = Carried(task, _formed(small[0].out), tuple(first), tuple(shared), dtype)
        # What blocks share may be there for other uses of the model, and no block may read it.
        for tried in (replace(carried, shared=()), carried) if shared else (carried,):
            missed = _find_missed(tried, model, blocks, small, logits)
            if missed is None:
                if not task.looks_ahead:
                    _check_causal(model, task, logits)
                return tried
    raise CheckpointError(f"{name} gives {missed} more than the block before it returned; its blocks cannot be run one by one.")


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
        with _InParts():
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


def _walk(model: Any, task: Task, blocks: torch.nn.ModuleList, shape: tuple[int, int]) -> tuple[list[_Call], torch.Tensor]:
    """Run the model on a text of no meaning; return what every block is given and returns, and the logits."""
    calls: list[_Call] = []
    order: list[int] = []

    def noting(i: int) -> Callable[..., Any]:
        own = blocks[i].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = (tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()})
            out = own(*args, **kwargs)
            every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            after = {key: dict(value) for key, value in every if isinstance(value, MutableMapping)}
            calls.append(_Call(*before, out, after))
            order.append(i)
            return out

        return forward

    with stand_ins(blocks, [noting(i) for i in range(len(blocks))]):
        logits = task.forward(model, task.trial(model.config, *shape))
    if order != list(range(len(blocks))):
        often = "more than once" if len(order) > len(set(order)) else "in another order than it holds them, or not all"
        raise CheckpointError(f"{type(model).__name__} runs its blocks {often}; they cannot be run one by one.")
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            f"{type(model).__name__} gives values that are not finite where its weights are random; it cannot be tried."
        )
    return calls, logits


def _shared_of(small: Sequence[_Call], large: Sequence[_Call], name: str) -> list[_Shared]:
    """Find the entries that blocks put into mappings which they are all given."""
    found: dict[tuple[int | str, Any], _Shared] = {}
    for i, (a, b) in enumerate(zip(small, large, strict=True)):
        for argument, content in a.after.items():
            before = _argument(a.args, a.kwargs, argument)
            for key, value in content.items():
                if (argument, key) in found or (key in before and _same(before[key], value)):
                    continue
                columns = _columns_of(value, b.after[argument][key])
                if not columns or None in columns:
                    raise CheckpointError(f"{name}: its blocks share {argument}[{key!r}], which is not one vector a token.")
                found[argument, key] = _Shared(argument, key, _formed(value), tuple(c for c in columns if c), i)
    return list(found.values())


def _check_causal(model: Any, task: Task, logits: torch.Tensor) -> None:
    """Raise CheckpointError when another last token changes what is said of those before it."""
    tokens = task.trial(model.config, *_SHAPES[0])
    tokens[:, -1] += 1
    moved = (task.forward(model, tokens) - logits)[:, :-1].abs().max()
    # Not equal to the last bit: experts sum tokens up in other batches.
    if float(moved) > 0.02 * float(logits.abs().max()):
        raise CheckpointError(
            f"{type(model).__name__} looks at later tokens: it is not {task.title}; bitpress quantizes {task.titles}."
        )


def _find_missed(
    carried: Carried, model: Any, blocks: torch.nn.ModuleList, calls: Sequence[_Call], logits: torch.Tensor
) -> str | None:
    """Name the first block, or the head, that is not given from the state what it was given in a forward of the whole model."""
    tokens = carried.task.trial(model.config, *_SHAPES[0])
    state = carried.begin(tokens)
    for i, call in enumerate(calls):
        try:
            args, kwargs = carried.arguments(model, blocks, i, state)
            # What is not carried may be something that a block is given and never looks at.
            enough = _same((call.args, call.kwargs), (args, kwargs)) or (
                _same((call.args, call.kwargs), (args, kwargs), but_missing=True)
                and _same(_tensors(call.out), _tensors(blocks[i](*args, **kwargs)))
            )
        except BREAKS:
            enough = False
        if not enough:
            return f"block {i}"
        state = carried.after(call.out, call.after, tokens)
    return None if _same(logits, carried.finish(model, blocks, tokens, state)) else "the head"


def _columns_of(small: Any, large: Any) -> list[_Columns | None]:
    """Say for every tensor how it becomes columns; None for one that does not, or that is no floating one."""
    found: list[_Columns | None] = []
    for a, b in zip(_tensors(small), _tensors(large), strict=True):
        axes = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]] if a.ndim == b.ndim else []
        sizes = [(a.shape[axis], b.shape[axis]) for axis in axes]
        want = [(_SHAPES[0][k], _SHAPES[1][k]) for k in (0, 1)]
        if sorted(sizes) != want or not a.is_floating_point():
            found.append(None)
            continue
        text, token = (axes[sizes.index(pair)] for pair in want)
        rest = tuple(size for axis, size in enumerate(a.shape) if axis not in axes)
        found.append(_Columns(text, token, rest, a.dtype))
    return found


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: int | str) -> Any:
    return args[name] if isinstance(name, int) else kwargs[name]


def _copied(value: Any) -> Any:
    """A mapping as it is now; anything else stays what it is, but for a tensor that a block might write into."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


_HERE = "a tensor"


def _formed(value: Any) -> Any:
    """A value with a mark where its tensors are."""
    if isinstance(value, (list, tuple)):
        return _like(value, [_formed(part) for part in value])
    return _HERE if isinstance(value, torch.Tensor) else value


def _filled(form: Any, values: Iterator[Any]) -> Any:
    if isinstance(form, (list, tuple)):
        return _like(form, [_filled(part, values) for part in form])
    return next(values) if form is _HERE else form


def _like(value: Any, parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _same(a: Any, b: Any, *, but_missing: bool = False) -> bool:
    """Whether all tensors in two values are equal; with `but_missing`, the second may lack some."""
    if but_missing and b is None:
        return True
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (list, tuple)):
        if not isinstance(b, (list, tuple)) or len(a) != len(b):
            return False
        return all(_same(x, y, but_missing=but_missing) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        known = set(a) & set(b) if but_missing and isinstance(b, Mapping) else set(a)
        return isinstance(b, Mapping) and set(b) == known and all(_same(a[k], b[k], but_missing=but_missing) for k in known)
    return (a is None) == (b is None)
