"""Names on the hub: under which tensors a checkpoint there stores the parameters of a model, where transformers holds them in another way.

    model.layers.0.mlp.experts.gate_up_proj [experts, 2 * inner, hidden]       a parameter of transformers
    model.layers.0.mlp.experts.5.gate_proj.weight [inner, hidden]              a piece of it, rows 10 * inner to 11 * inner of all experts'

Other tools, and transformers before version 5, read the names of the hub alone. Which rows a piece has is asked of transformers: its own
conversion is run backwards over the numbers of the rows, and then forwards, which must put every row in its place again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpress.checkpoints.names import map_names
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import CheckpointError

__all__ = ["HubNames", "Piece", "hub_names"]


@dataclass(frozen=True)
class Piece:
    """A tensor on the hub: its name, its shape, and the rows of the parameter that it is, the matrices of a stack below each other."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def cut(self, value: torch.Tensor) -> torch.Tensor:
        """Return the piece of a parameter's value."""
        if value.ndim < 2:
            return value
        return value.reshape(-1, value.shape[-1])[self.start : self.stop].reshape(self.shape).contiguous()


# Pieces by the parameter, in the order of their rows; a parameter that the hub stores as it is, under its own name, is left out.
HubNames = Mapping[str, tuple[Piece, ...]]


def hub_names(model: Any) -> HubNames:
    """Return the pieces of the parameters of a model without weights.

    The result is empty where transformers' conversion cannot be undone, or moves more than whole rows: such a model keeps the names of
    transformers, which reads both.
    """
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    first: dict[str, int] = {}
    tags: dict[str, torch.Tensor] = {}
    count = 0
    for name, value in state.items():
        shape = _tag_shape(tuple(value.shape))
        first[name] = count
        tags[name] = torch.arange(count, count + torch.Size(shape).numel()).view(shape)
        count += tags[name].numel()
    stored = _undone(model, tags)
    if stored is None:
        return {}
    owners, starts = list(first), torch.tensor(list(first.values()))
    found: dict[str, list[Piece]] = {}
    for hub, rows in stored.items():
        flat = rows.flatten()  # numbers of rows of all parameters
        if not len(flat) or not torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat))):
            return {}
        owner = owners[int(torch.searchsorted(starts, flat[0], right=True)) - 1]
        whole = tuple(state[owner].shape)
        start = int(flat[0]) - first[owner]
        shape = whole if len(whole) < 2 else (*rows.shape[:-1], whole[-1])
        found.setdefault(owner, []).append(Piece(hub, shape, start, start + len(flat)))
    if not _come_back(model, state, tags, found):
        return {}
    changed = {name: tuple(sorted(pieces, key=lambda piece: piece.start)) for name, pieces in found.items()}
    return {name: pieces for name, pieces in changed.items() if [piece.name for piece in pieces] != [name]}


def _tag_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the numbers of a parameter's rows."""
    return shape if len(shape) < 2 else (*shape[:-1], 1)


def _undone(model: Any, tags: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return what transformers would save; None where it cannot."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, dict(tags)))
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError):
        return None


def _come_back(
    model: Any, state: Mapping[str, torch.Tensor], tags: Mapping[str, torch.Tensor], found: Mapping[str, list[Piece]]
) -> bool:
    """Whether reading the pieces gives every parameter again, each row in its place."""
    pieces = {piece.name: (piece, owner) for owner, its in found.items() for piece in its}
    if sum(len(its) for its in found.values()) != len(pieces) or found.keys() != state.keys():
        return False
    entries = {
        name: TensorEntry(name, "F32" if state[owner].is_floating_point() else "I64", piece.shape, 0, 0)
        for name, (piece, owner) in pieces.items()
    }

    def rows(name: str) -> torch.Tensor:
        piece, owner = pieces[name]
        return tags[owner].flatten()[piece.start : piece.stop].view(_tag_shape(piece.shape))

    try:
        made = map_names(model, entries, rows).load(rows, "")
    except (CheckpointError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return made.keys() == tags.keys() and all(torch.equal(value, tags[name]) for name, value in made.items())
