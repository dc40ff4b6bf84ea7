"""The attention of a block, recorded at torch's `scaled_dot_product_attention`, for any architecture around it.

query [batch, heads, tokens, row]      key, value [batch, key heads, tokens, row]; several heads may share a key head
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch.overrides import TorchFunctionMode

from bitpress.calibration.observed import Observed, product_of
from bitpress.calibration.stats import add_gram_, mirrored
from bitpress.errors import NumericsError
from bitpress.finite import all_finite

__all__ = ["Attention", "HeadCollector", "Role", "find_roles", "is_attention", "token_weights"]

Role = Literal["query", "key", "value", "output"]

_PARTS: tuple[Role, ...] = ("query", "key", "value")
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Scores of all heads that are computed at a time, so that they are still in the processor's cache when they are used.
_TOGETHER = 1 << 19
# The weight of the token with the most attention; the token with the least has 1.
MOST = 3.0


def is_attention(func: Any) -> bool:
    return func is torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Attention:
    """One call's arguments."""

    query: Float[torch.Tensor, "batch heads tokens row"]
    key: Float[torch.Tensor, "batch keyheads keys row"]
    value: Float[torch.Tensor, "batch keyheads keys value_row"]
    mask: torch.Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Attention":
        given = dict(zip(_NAMES, args, strict=False)) | dict(kwargs)
        query = given["query"]
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return cls(query, given["key"], given["value"], given.get("attn_mask"), bool(given.get("is_causal")), scale)

    def scores(self, sample: int) -> Iterator[Float[torch.Tensor, "heads rows until"]]:
        """Yield the attention of every head, some rows (tokens) at a time: each row sums to 1.

        Columns (tokens) end after the last one that a row of a causal attention can see.
        """
        key = self.key[sample].float()
        query = self.query[sample].float().unflatten(0, (key.shape[0], -1)) * self.scale  # [key heads, group, tokens, row]
        heads, tokens, keys = self.query.shape[1], query.shape[2], key.shape[1]
        step = max(1, _TOGETHER // (heads * keys))
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            until = min(stop, keys) if self.causal else keys
            logits = query[:, :, start:stop].flatten(1, 2) @ key[:, :until].mT
            logits = logits.reshape(heads, stop - start, until)
            if self.causal:
                later = torch.ones(stop - start, max(until - start, 0), dtype=torch.bool, device=key.device).triu(1)
                logits[:, :, start:].masked_fill_(later, -torch.inf)
            if self.mask is not None:
                mask = self.mask.expand(*self.query.shape[:2], tokens, keys)[sample, :, start:stop, :until]
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
            yield torch.softmax(logits, -1)


def token_weights(attention: Attention) -> Float[torch.Tensor, "batch tokens"]:
    """Weigh every token by the attention that it gets from all heads and tokens of its text: from 1 to `MOST`, then scaled to a mean of 1."""
    rows = []
    for sample in range(attention.query.shape[0]):
        paid = torch.zeros(attention.key.shape[2], device=attention.key.device)
        for scores in attention.scores(sample):
            paid[: scores.shape[-1]] += scores.sum((0, 1))
        lowest, highest = paid.min(), paid.max()
        share = (paid - lowest) / (highest - lowest) if highest > lowest else torch.zeros_like(paid)
        weight = 1 + (MOST - 1) * share
        rows.append(weight / weight.mean())
    return torch.stack(rows)


class HeadCollector:
    """Sums up, head by head, how a block's only attention propagates errors in its query, key and value weights.

        query   row_gram = sum of k k'          the error of the scores is (dq)'k and q'(dk)
        key     row_gram = sum of q q'          of the heads that share the key head
        value   row_gram = o' o                 o [hidden, row], the output weight's columns of the head, likewise
                head_gram = sum of (a x)'(a x)  a [tokens, tokens] the head's scores, x [tokens, in] the value weight's input

    Queries and keys include rotary positions, as they are multiplied with each other.
    """

    def __init__(self, weights: Mapping[Role, Observed]) -> None:
        self.weights = weights
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._mixed: torch.Tensor | None = None
        self._rows = 0

    def add(self, attention: Attention, x: Float[torch.Tensor, "*tokens in"]) -> None:
        """Add the attention of one forward; `x` is the value weight's input."""
        query, key = attention.query.float(), attention.key.float()
        self._rows = query.shape[-1]
        key = key[:, :: key.shape[1] // self._heads("key")]
        group = query.shape[1] // key.shape[1]
        keys = torch.einsum("bhtr,bhts->hrs", key, key)
        self._add("query", "row_gram", keys.repeat_interleave(group, 0))
        queries = torch.einsum("bhtr,bhts->hrs", query, query)
        self._add("key", "row_gram", queries.unflatten(0, (-1, group)).sum(1))
        heads, size = self._heads("value"), x.shape[-1]
        if self._mixed is None:
            self._mixed = torch.zeros(heads, size, size, device=x.device)
        for sample, text in enumerate(x.float().reshape(query.shape[0], -1, size)):
            # (a x)'(a x) of all heads that share the value's: one product with x for all of them, and of small matrices else.
            paid = torch.zeros(heads, text.shape[0], text.shape[0], device=x.device)
            for scores in attention.scores(sample):
                for own, rows in zip(paid, scores.unflatten(0, (heads, -1)).flatten(1, 2), strict=True):
                    add_gram_(own[: rows.shape[1], : rows.shape[1]], rows)
            for own, mixed in zip(paid, self._mixed, strict=True):
                add_gram_(mixed, text, mirrored(own) @ text)

    def finish(self, name: str, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return a weight's row_gram and head_gram; None if it has no such role in the attention."""
        row_gram = self._sums[name, "row_gram"] / tokens if (name, "row_gram") in self._sums else None
        head_gram = None
        if name == self.weights["value"].name and self._mixed is not None:
            head_gram = torch.stack([mirrored(mixed) for mixed in self._mixed]) / tokens
            if not all_finite(head_gram):
                raise NumericsError(
                    f"{name}: the attention holds a NaN or an infinity during calibration; check the weights, or try another calibration text."
                )
            output = self.weights["output"].matrix.float()
            parts = output.unflatten(1, (-1, self._rows)).transpose(0, 1)  # [heads, hidden, row]
            row_gram = (parts.mT @ parts).unflatten(0, (self._heads("value"), -1)).sum(1)
        return row_gram, head_gram

    def _heads(self, role: Role) -> int:
        return self.weights[role].matrix.shape[0] // self._rows

    def _add(self, role: Role, statistic: str, value: torch.Tensor) -> None:
        key = (self.weights[role].name, statistic)
        self._sums[key] = self._sums[key] + value if key in self._sums else value


def find_roles(run: Callable[[], Any], observed: Sequence[Observed]) -> dict[Role, Observed]:
    """Find the weights that compute the queries, keys and values of a block's only attention, and the one that reads its output.

    `run` runs the block on a short input. A weight that computes several of them, or only a part of one, has no role.
    """
    plain = _Probe(None)
    with plain:
        run()
    if len(plain.seen) != 1:
        return {}
    row = plain.seen[0].query.shape[-1]
    flat = plain.outputs[0].transpose(1, 2).flatten(2)
    roles: dict[Role, Observed] = {}
    for w in observed:
        inputs = [x for x, address in plain.inputs if address == w.view.data_ptr()]
        if any(x.numel() == flat.numel() and torch.equal(x.reshape(flat.shape), flat) for x in inputs):
            roles["output"] = w
            continue
        with (changed := _Probe(w.view.data_ptr())):
            run()
        if len(changed.seen) != 1:
            return {}
        moved = [part for part in _PARTS if not torch.equal(getattr(plain.seen[0], part), getattr(changed.seen[0], part))]
        if len(moved) == 1 and w.matrix.shape[0] % row == 0 and moved[0] not in roles:
            roles[moved[0]] = w
    return roles if len(roles) == 4 and plain.seen[0].value.shape[-1] == row else {}


class _Probe(TorchFunctionMode):
    """Records the attention of a forward and the inputs of its products; changes the output of the weight at `address`."""

    def __init__(self, address: int | None) -> None:
        super().__init__()
        self.address = address
        self.seen: list[Attention] = []
        self.outputs: list[torch.Tensor] = []
        self.inputs: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = product_of(func, args, kwargs)
        out = func(*args, **kwargs)
        if product is not None:
            self.inputs.append((product[0], product[1].data_ptr()))
            if product[1].data_ptr() == self.address:
                # Not a multiple: a norm after the product would undo it.
                out = out + torch.arange(out.shape[-1], dtype=out.dtype, device=out.device).cos()
        if is_attention(func):
            self.seen.append(Attention.of(args, kwargs))
            self.outputs.append(out)
        return out
