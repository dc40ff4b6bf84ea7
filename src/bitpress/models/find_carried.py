"""Find what a model carries from block to block, and which of its lists of blocks the inputs run through.

The model runs once without its weights (`hollow`). That run also shows whether the state is enough: from it each block, and the head, must
be given what the blocks themselves gave.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitpress.errors import CheckpointError
from bitpress.exhaustion import is_out_of_memory
from bitpress.models.carried import Carried, Columns, Shared, argument_of, formed, tensors_of
from bitpress.models.hollow import BREAKS, Stop, hollow, stand_ins
from bitpress.models.skeleton import find_stacks
from bitpress.models.task import Task

__all__ = ["choose_stack", "find_carried"]

# Two shapes that no other size of a model follows: from one to the other, axes of texts and of tokens change, and those alone.
_SHAPES = ((2, 5), (3, 7))


@dataclass
class _Call:
    """One block's part in a forward; mappings as they were before and after."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    after: dict[int | str, dict[Any, Any]]


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
        forms = {repr(formed(call.out)) for call in small}
        first = _columns_of(small[0].out, large[0].out)
        if len(forms) > 1 or any(_columns_of(a.out, b.out) != first for a, b in zip(small, large, strict=True)):
            raise CheckpointError(f"{name}: its blocks return different things; they cannot be run one by one.")
        if not first or first[0] is None:
            raise CheckpointError(f"{name}: its blocks do not work on one vector a token; they cannot be run one by one.")
        shared = _shared_of(small, large, name)
        types = [c.dtype for c in (*first, *(c for entry in shared for c in entry.columns)) if c is not None]
        for other in types:
            dtype = torch.promote_types(dtype, other)
        carried = Carried(task, formed(small[0].out), tuple(first), tuple(shared), dtype)
        # What blocks share may be there for other uses of the model, and no block may read it.
        for tried in (replace(carried, shared=()), carried) if shared else (carried,):
            missed = _find_missed(tried, model, blocks, small, logits)
            if missed is None:
                if not task.looks_ahead:
                    _check_causal(model, task, logits)
                return tried
    raise CheckpointError(f"{name} gives {missed} more than the block before it returned; its blocks cannot be run one by one.")


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


def _shared_of(small: Sequence[_Call], large: Sequence[_Call], name: str) -> list[Shared]:
    """Find the entries that blocks put into mappings which they are all given."""
    found: dict[tuple[int | str, Any], Shared] = {}
    for i, (a, b) in enumerate(zip(small, large, strict=True)):
        for argument, content in a.after.items():
            before = argument_of(a.args, a.kwargs, argument)
            for key, value in content.items():
                if (argument, key) in found or (key in before and _same(before[key], value)):
                    continue
                columns = _columns_of(value, b.after[argument][key])
                if not columns or None in columns:
                    raise CheckpointError(f"{name}: its blocks share {argument}[{key!r}], which is not one vector a token.")
                found[argument, key] = Shared(argument, key, formed(value), tuple(c for c in columns if c), i)
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
                and _same(tensors_of(call.out), tensors_of(blocks[i](*args, **kwargs)))
            )
        except BREAKS:
            enough = False
        if not enough:
            return f"block {i}"
        state = carried.after(call.out, call.after, tokens)
    return None if _same(logits, carried.finish(model, blocks, tokens, state)) else "the head"


def _columns_of(small: Any, large: Any) -> list[Columns | None]:
    """Say for every tensor how it becomes columns; None for one that does not, or that is no floating one."""
    found: list[Columns | None] = []
    for a, b in zip(tensors_of(small), tensors_of(large), strict=True):
        axes = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]] if a.ndim == b.ndim else []
        sizes = [(a.shape[axis], b.shape[axis]) for axis in axes]
        want = [(_SHAPES[0][k], _SHAPES[1][k]) for k in (0, 1)]
        if sorted(sizes) != want or not a.is_floating_point():
            found.append(None)
            continue
        text, token = (axes[sizes.index(pair)] for pair in want)
        rest = tuple(size for axis, size in enumerate(a.shape) if axis not in axes)
        found.append(Columns(text, token, rest, a.dtype))
    return found


def _copied(value: Any) -> Any:
    """A mapping as it is now; anything else stays what it is, but for a tensor that a block might write into."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return value.clone() if isinstance(value, torch.Tensor) else value


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
