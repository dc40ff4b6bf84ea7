"""An export read back: every parameter is there, and holds what the model holds, or what the report says that it lost."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.hub_names import HubNames, Piece
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import NumericsError
from bitpress.exchange.export_directory import added_error
from bitpress.exchange.gguf import GgufSource
from bitpress.exchange.pieces import pieces_of
from bitpress.exchange.source import Fate, Fates, Source
from bitpress.exchange.table import open_source
from bitpress.formats import CompressedLayer
from bitpress.progress import Progress

__all__ = ["read_back"]

_PLAIN = Fate("exact")


def read_back(
    checkpoint: CompressedCheckpoint, out: Path, fates: Fates, added: Mapping[str, float], names: HubNames, progress: Progress
) -> None:
    """Raise NumericsError, by the name of the first such parameter, unless an export holds this model.

    A compressed weight that is carried over, and a plain tensor, have the same values. A value that is stored in another type is the nearest
    of that type, and its error is among those `added`. A weight that was rounded again has the error that `added` says.
    """
    source = open_source(out)
    shapes = {name: tuple(entry.shape) for name, entry in checkpoint.plain.items()}
    shapes |= {name: r.parameter(name).parameter_shape for name, r in checkpoint.manifest.weights.items()}
    pieces = {name: pieces_of(names, name, shape) for name, shape in shapes.items()}
    _check_names(source, {piece.name for its in pieces.values() for piece in its}, out)
    progress.begin("reading back", len(pieces))
    for name, its in pieces.items():
        fate = fates.get(name, _PLAIN)
        if name in checkpoint.plain:
            value = read_tensor(*checkpoint.tensors[name])
        elif fate.how == "decoded":
            value = checkpoint.decoded(name, checkpoint.read_layer(name))
        else:
            value = checkpoint.read_weight(name).dequantize()
        if name in checkpoint.plain or fate.how == "decoded":
            _check_plain(source, value, its, reported=name in added, out=out)
        else:
            _check_weight(source, value, its, added[name] if fate.how == "rounded" else None, out)
        progress.advance(name)


def _check_names(source: Source, wanted: set[str], out: Path) -> None:
    if missing := sorted(wanted - set(source.names)):
        raise NumericsError(f"{out}: {missing[0]} is missing when it is read back; do not use this export.")
    if more := sorted(set(source.names) - wanted):
        raise NumericsError(f"{out}: {more[0]} is no parameter of the model; do not use this export.")


def _check_plain(source: Source, value: torch.Tensor, pieces: tuple[Piece, ...], *, reported: bool, out: Path) -> None:
    """Compare a tensor that is stored as it is, or in a type that holds it within a `reported` error."""
    for piece in pieces:
        got, expected = source.read(piece.name), piece.cut(value)
        if isinstance(got, torch.Tensor) and got.shape == expected.shape:
            if isinstance(source, GgufSource) and source.places[piece.name].shifted:
                got, expected = got.float() + 1, expected.float() + 1  # the file holds the sum
            common = got.dtype if reported else torch.promote_types(got.dtype, expected.dtype)
            if torch.equal(got.to(common), expected.to(common)):
                continue
        raise NumericsError(f"{out}: {piece.name} is another tensor when it is read back; do not use this export.")


def _check_weight(source: Source, value: torch.Tensor, pieces: tuple[Piece, ...], error: float | None, out: Path) -> None:
    """Compare a weight `[out, in]` whose codes are stored; `error` is what rounding it again added."""
    found: list[torch.Tensor] = []
    for piece in pieces:
        layer = source.read(piece.name)
        part = layer.weight.dequantize() if isinstance(layer, CompressedLayer) else None
        if part is None or (error is None and not torch.equal(part, value[piece.start : piece.stop])):
            raise NumericsError(f"{out}: {piece.name} is another weight when it is read back; do not use this export.")
        found += [part] if error is not None else []
    if error is not None and not math.isclose(added_error(value, torch.cat(found)), error, rel_tol=1e-6):
        raise NumericsError(f"{out}: {pieces[0].name} has another error when it is read back; do not use this export.")
