"""Products: which parameters of a model are weights to compress, and why every other one is kept as it is.

A weight is the matrix of a `Linear`, of GPT-2's `Conv1D` (stored [in, out]), or a stack of one matrix per expert: a parameter of three
axes, or of two with the matrices below each other. What a parameter does follows from `uses`, not from its name or its size.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitpress.checkpoints.parameter import WeightParameter, stem
from bitpress.models.streaming import StreamedModel
from bitpress.models.uses import Axis, Product, Use

__all__ = ["SKIPPED", "OuterMatrices", "find_outer", "list_kept_outside", "list_weights", "overlooked", "skipping"]

# Why a parameter is kept. The first two are products that nobody asked to keep: an error under --strict.
UNKNOWN_PRODUCT = "a matrix product in a form that is not compressed"
OUTSIDE = "a matrix product outside the blocks"
UNUSED = "not used by the model on a short text"
SKIPPED = "skipped as asked"  # and the pattern
ROUTER = "router"
EMBEDDING = "embedding"
HEAD = "head"
VECTOR = "norm, bias or other vector"
ELEMENTWISE = "no matrix product"


def list_weights(model: StreamedModel, i: int, skip: Sequence[str]) -> tuple[list[WeightParameter], dict[str, str]]:
    """List the weights of a block in the order of its modules, and why each other parameter is kept as it is.

    Of the patterns of `skip` the last one that matches decides; one behind "!" takes back what those before leave out.
    """
    weights: list[WeightParameter] = []
    kept: dict[str, str] = {}
    for path, module in model.blocks[i].named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            name = ".".join(part for part in (model.block_name(i), path, leaf) if part)
            # A parameter that two modules share is used under the first one's name.
            found = _judge(name, value, module, model.uses.get(name, Use()))
            names = found.pattern_names if isinstance(found, WeightParameter) else (stem(name), name)
            pattern = None if found == VECTOR else skipping(names, skip)
            if isinstance(found, str):
                unmeant = found in (UNKNOWN_PRODUCT, UNUSED) and pattern is not None
                kept[name] = f"{SKIPPED} ({pattern})" if unmeant else found
            elif pattern is not None:
                kept[name] = f"{SKIPPED} ({pattern})"
            else:
                weights.append(found)
    return weights, kept


def list_kept_outside(model: StreamedModel, skip: Sequence[str]) -> dict[str, str]:
    """Say why each parameter that is in no block is kept as it is."""
    network = model.model
    head = network.get_output_embeddings()
    kept: dict[str, str] = {}
    for name, value in network.named_parameters():
        if name.startswith(f"{model.stack}."):
            continue
        use = model.uses.get(name, Use())
        if value.ndim < 2:
            kept[name] = VECTOR
        elif "embedding" in use.others:
            kept[name] = EMBEDDING
        elif head is not None and value is head.weight:
            kept[name] = HEAD
        elif use.router:
            kept[name] = ROUTER
        elif not use.multiplies:
            kept[name] = _elementwise(use) if use.others else UNUSED
        else:
            kept[name] = OUTSIDE
        pattern = skipping((stem(name), name), skip)
        if pattern is not None and kept[name] in (OUTSIDE, UNUSED):
            kept[name] = f"{SKIPPED} ({pattern})"
    return kept


@dataclass(frozen=True)
class OuterMatrices:
    """The table of embeddings [vocabulary, hidden] and the output head's weight, None where a model has none; one object if they are tied."""

    embeddings: WeightParameter | None
    head: WeightParameter | None

    @property
    def tied(self) -> bool:
        return self.embeddings is not None and self.embeddings is self.head


def find_outer(network: Any) -> OuterMatrices:
    """Find the matrices before and behind the blocks of a model of transformers."""
    try:
        embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    except NotImplementedError:  # of models that take no tokens
        return OuterMatrices(None, None)
    ties = dict(network.all_tied_weights_keys)
    names: dict[int, str] = {}
    for name, module in network.named_modules():
        names.setdefault(id(module), f"{name}.weight")

    def parameter(module: Any, kind: type[torch.nn.Module]) -> WeightParameter | None:
        if not isinstance(module, kind) or id(module) not in names:
            return None
        name = names[id(module)]
        weight: Any = module.weight
        return WeightParameter(ties.get(name, name), tuple(weight.shape), False)

    table, top = parameter(embeddings, torch.nn.Embedding), parameter(head, torch.nn.Linear)
    return OuterMatrices(table, table if table == top else top)


def overlooked(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of kept parameters that are matrix products and were not skipped by name, by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in kept.items():
        if reason in (UNKNOWN_PRODUCT, OUTSIDE):
            found.setdefault(reason, []).append(name)
    return found


def skipping(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    """Return the pattern by which a weight of these names is left alone; None where it is not."""
    matched = (p for p in reversed(patterns) if any(fnmatch.fnmatchcase(name, p.removeprefix("!")) for name in names))
    last = next(matched, "!")
    return None if last.startswith("!") else last


def _judge(name: str, value: torch.Tensor, module: torch.nn.Module, use: Use) -> WeightParameter | str:
    """Return a parameter of a block as a weight, or the reason why it is none."""
    if value.ndim < 2:
        return VECTOR
    if use.router:
        return ROUTER
    if not use.multiplies and use.others:
        return EMBEDDING if use.others == {"embedding"} else _elementwise(use)
    if not use.multiplies:
        # A branch that a short text does not take: a layer's own orientation is known all the same.
        return _of_layer(name, value, module) or UNUSED
    if use.computed or use.others:
        return UNKNOWN_PRODUCT
    return _of_layer(name, value, module, use.products) or _of_stack(name, value, use.products) or UNKNOWN_PRODUCT


def _elementwise(use: Use) -> str:
    return f"{ELEMENTWISE} ({', '.join(sorted(use.others))})"


def _of_layer(
    name: str, value: torch.Tensor, module: torch.nn.Module, products: set[Product] | None = None
) -> WeightParameter | None:
    """Return the weight of a `Linear` or a `Conv1D`, where all of it is used as these do."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, (torch.nn.Linear, Conv1D)) or value.ndim != 2 or not name.endswith(".weight"):
        return None
    rows, columns = value.shape
    transposed = isinstance(module, Conv1D)
    if products is not None and any(_placed(p, rows, columns) != transposed for p in products):
        return None
    return WeightParameter(name, (columns, rows) if transposed else (rows, columns), transposed)


def _of_stack(name: str, value: torch.Tensor, products: set[Product]) -> WeightParameter | None:
    """Return a stack of matrices that are used one by one, or all in one batched product."""
    if value.ndim == 3:
        experts, rows, columns = value.shape
    elif value.ndim == 2:
        columns = value.shape[1]
        # Below each other: the matrices' height is what the products take at a time.
        heights = {p.outputs.size if p.outputs.stride >= p.summed.stride else p.summed.size for p in products}
        rows = heights.pop()
        if heights or rows >= value.shape[0] or value.shape[0] % rows:
            return None
        experts = value.shape[0] // rows
    else:
        return None
    placed = {_placed(p, rows, columns) for p in products}
    if len(placed) != 1 or None in placed or any(p.start % (rows * columns) for p in products):
        return None
    transposed = placed == {True}
    return WeightParameter(name, (columns, rows) if transposed else (rows, columns), transposed, experts, flat=value.ndim == 2)


def _placed(product: Product, rows: int, columns: int) -> bool | None:
    """Say whether a product of a whole matrix stored [rows, columns] sums over its rows; None where it is another product."""

    def is_rows(axis: Axis) -> bool:
        return axis.size == rows and (axis.stride == columns or rows == 1)

    def is_columns(axis: Axis) -> bool:
        return axis.size == columns and (axis.stride == 1 or columns == 1)

    if is_columns(product.summed) and is_rows(product.outputs):
        return False
    return True if is_rows(product.summed) and is_columns(product.outputs) else None
