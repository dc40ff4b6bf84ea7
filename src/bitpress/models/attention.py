"""Attention with rounded operands, for every architecture whose attention goes through transformers' attention interface.

A model is told once to call the function here (`listen_`). Modules that compute an attention hand it queries and keys behind rotary
positions, and values; it rotates and rounds what the module's `AttentionOperands` say, and the rest is torch's own attention. Only where probabilities
are rounded is the softmax taken here, in float32 and some queries at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration.attention import Attention
from bitpress.errors import CheckpointError, FormatError, NumericsError
from bitpress.formats import ActivationFormat, AttentionOperands
from bitpress.models.task import Task
from bitpress.models.uses import find_uses

__all__ = [
    "HeadSizes",
    "Watch",
    "attention_as_it_is",
    "find_attentions",
    "forget_attention_",
    "listen_",
    "round_attention_",
    "watching",
]

# The name under which transformers knows the function, and what it finds at a module.
INTERFACE = "bitpress"
_ROUNDED, _WATCHED = "bitpress_attention", "bitpress_watch"
# What is shown every tensor of an operand, by its name, before it is rounded.
Watch = Mapping[str, Callable[[torch.Tensor], None]]


@dataclass(frozen=True)
class _Rounded:
    """A module's operands; its name stands in errors."""

    name: str
    operands: AttentionOperands


def listen_(model: Any) -> None:
    """Let a model's attention go through the function here. Raises CheckpointError for one that computes attention in its own way."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = model.config._attn_implementation
    if implementation == INTERFACE:
        return
    if implementation != "sdpa":
        raise CheckpointError(
            f"{type(model).__name__}: its attention is computed in a way of its own ({implementation}), where queries, keys, values and "
            "probabilities cannot be rounded; leave them out."
        )
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, partial(_forward, sdpa_attention_forward))
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, sdpa_mask)
    model.set_attn_implementation(INTERFACE)


def round_attention_(model: Any, operands: Mapping[str, AttentionOperands]) -> None:
    """Let modules round the operands of their attention, by the modules' names. Raises CheckpointError for a module that is not there."""
    if not operands:
        return
    listen_(model)
    modules = dict(model.named_modules())
    for name, own in operands.items():
        if name not in modules:
            raise CheckpointError(f"{type(model).__name__} has no module {name!r}, whose attention is to be rounded.")
        modules[name].__dict__[_ROUNDED] = _Rounded(name, own)


def forget_attention_(module: torch.nn.Module) -> None:
    """Let no module below this one round its attention."""
    for below in module.modules():
        below.__dict__.pop(_ROUNDED, None)


@contextmanager
def attention_as_it_is(module: torch.nn.Module) -> Iterator[None]:
    """Let no module below this one round its attention in the meantime."""
    held = [(below, below.__dict__[_ROUNDED]) for below in module.modules() if _ROUNDED in below.__dict__]
    forget_attention_(module)
    try:
        yield
    finally:
        for below, rounded in held:
            below.__dict__[_ROUNDED] = rounded


@contextmanager
def watching(model: Any, watches: Mapping[str, Watch]) -> Iterator[None]:
    """Show the operands of modules, by the modules' names, while the model runs."""
    listen_(model)
    modules = dict(model.named_modules())
    try:
        for name, watch in watches.items():
            modules[name].__dict__[_WATCHED] = watch
        yield
    finally:
        for name in watches:
            modules[name].__dict__.pop(_WATCHED, None)


@dataclass(frozen=True)
class HeadSizes:
    """An attention's heads of queries, keys and values, by the operand's name: how many there are, and the values of a token in one."""

    heads: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


def find_attentions(model: Any, task: Task) -> dict[str, HeadSizes]:
    """Return the heads of queries, keys and values, by the names of the modules that compute an attention.

    The model's own code runs once without weights. Raises CheckpointError.
    """
    found: dict[str, HeadSizes] = {}

    def note(name: str, operand: str, x: torch.Tensor) -> None:
        sizes = found.setdefault(name, HeadSizes())
        sizes.heads[operand], sizes.rows[operand] = int(x.shape[1]), int(x.shape[-1])

    names = [name for name, _ in model.named_modules()]
    parts = ("queries", "keys", "values")
    with watching(model, {name: {part: partial(note, name, part) for part in parts} for name in names}):
        find_uses(model, task)
    return found


def _forward(
    inner: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *rest: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stand for transformers' function of the same arguments, `inner`."""
    watch: Watch = module.__dict__.get(_WATCHED, {})
    rounded = module.__dict__.get(_ROUNDED, _Rounded("", AttentionOperands()))
    operands = rounded.operands.to(query.device)
    query, key = operands.turned(query), operands.turned(key)
    query, key, value = (
        _round(rounded.name, name, x, own, watch)
        for name, x, own in (
            ("queries", query, operands.queries),
            ("keys", key, operands.keys),
            ("values", value, operands.values),
        )
    )
    if operands.probabilities is None and "probabilities" not in watch:
        return inner(module, query, key, value, attention_mask, *rest, scaling=scaling, is_causal=is_causal, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise FormatError("probabilities are not rounded where an attention has a bias of positions; leave them out.")
    tokens = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and tokens > 1 and attention_mask is None
    if causal:  # a cache with room behind the last token
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask, blind = _open_rows(attention_mask)
    attention = Attention(query, key, value, mask, causal, scale)
    show = watch.get("probabilities", lambda x: None)
    out = torch.stack([_attend(attention, i, rounded.name, operands, show) for i in range(query.shape[0])])
    out = out if blind is None else out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).contiguous(), None


def _open_rows(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a mask in which every query sees a key, and the queries that saw none, as padding in front of a text: torch returns 0 for these."""
    if mask is None:
        return None, None
    blind = (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)
    return (mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)), blind


def _round(name: str, operand: str, x: torch.Tensor, own: ActivationFormat | None, watch: Watch) -> torch.Tensor:
    try:
        if operand in watch:
            watch[operand](x)
        return x if own is None else own.round(x)
    except NumericsError as error:
        raise NumericsError(f"{name}: {operand}: {error}") from error


def _attend(
    attention: Attention, sample: int, name: str, operands: AttentionOperands, show: Callable[[torch.Tensor], None]
) -> Float[torch.Tensor, "heads tokens row"]:
    """Return the output of one sample of a batch, its probabilities rounded."""
    value = attention.value[sample].float()
    pieces = []
    for scores in attention.scores(sample):
        p = _round(name, "probabilities", scores, operands.probabilities, {"probabilities": show})
        p = p if operands.offset is None else operands.offset.apply(p, scores)
        # A key that is masked or comes later has the probability 0, which no format may raise.
        p = torch.where(scores == 0, 0.0, p).unflatten(0, (value.shape[0], -1))  # [key heads, group, rows, until]
        pieces.append(torch.einsum("kgtu,kur->kgtr", p, value[:, : p.shape[-1]]).flatten(0, 1))
    return torch.cat(pieces, 1).to(attention.query.dtype)
