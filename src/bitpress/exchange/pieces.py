"""Experts: their layers one by one, as most tools store them, and all of a block in one compressed stack, as they are held here.

A piece is some rows of the stack (`checkpoints.hub_names`): the matrix of one expert, or half of it where two are joined.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bitpress.checkpoints.hub_names import HubNames, Piece
from bitpress.errors import FormatError
from bitpress.exchange.source import LayerFormat
from bitpress.formats import CompressedLayer, CompressedWeight, parse_format
from bitpress.formats.maps.parts import PartMaps

__all__ = ["cut_layer", "join_layers", "pieces_of", "refuse_pieces", "spec_of_piece"]


def pieces_of(names: HubNames, parameter: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the tensors that a parameter of this shape is stored in: itself where the hub has it under its own name."""
    rows = torch.Size(shape[:-1]).numel() if len(shape) > 1 else torch.Size(shape).numel()
    return names.get(parameter) or (Piece(parameter, shape, 0, rows),)


def cut_layer(layer: CompressedLayer, piece: Piece) -> CompressedLayer:
    """Return a piece of a stack with its codes. Raises FormatError where rows cannot be separated there."""
    if piece.stop - piece.start == layer.weight.shape[0]:
        return layer
    return CompressedLayer(layer.weight.row_slice(piece.start, piece.stop), layer.input)


def join_layers(layers: Sequence[CompressedLayer], experts: int) -> CompressedLayer:
    """Stack pieces, those of one expert side by side. Raises FormatError unless all have one format, and those of an expert one map."""
    first = layers[0]
    if any(layer.input_spec() != first.input_spec() or layer.input is not None for layer in layers):
        raise FormatError("the inputs of their products are rounded.")
    each = len(layers) // experts
    weights = [_one_expert([layer.weight for layer in layers[i : i + each]]) for i in range(0, len(layers), each)]
    return CompressedLayer(CompressedWeight.stack_rows(weights))


def _one_expert(parts: Sequence[CompressedWeight]) -> CompressedWeight:
    """Stack the weights of one expert, which take the same inputs."""
    first = parts[0]
    maps = [{} if part.input_map is None else part.input_map.tensors() for part in parts]
    alike = all(
        own.keys() == maps[0].keys() and all(torch.equal(value, maps[0][name]) for name, value in own.items()) for own in maps
    )
    if not alike or any(part.output_map is not None for part in parts):
        raise FormatError("weights that an expert joins take their inputs in different orders.")
    return CompressedWeight(
        CompressedWeight.stack_rows([CompressedWeight(part.terms) for part in parts]).terms, first.input_map
    )


def spec_of_piece(spec: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the specification of one piece of a stack: a matrix, with the map of its part."""
    told: dict[str, Any] = {"shape": [rows, spec["shape"][1]]}
    told["terms"] = [{key: value for key, value in term.items() if key != "parts"} for term in spec["terms"]]
    for side in ("input_map", "output_map"):
        change = spec[side]
        told[side] = change["map"] if change is not None and change["kind"] == PartMaps.kind else change
    return told


def refuse_pieces(
    spec: Mapping[str, Any],
    pieces: Sequence[Piece],
    target: type[LayerFormat],
    input_spec: Mapping[str, str] | None = None,
) -> str | None:
    """Return why a tool cannot hold the pieces of a stack of this specification bit for bit; None if it can."""
    if len(pieces) < 2 or any(len(piece.shape) != 2 or piece.shape[1] != spec["shape"][1] for piece in pieces):
        return "its experts are stored in one tensor on the hub, of which no tool's compressed layout is written"
    for rows in sorted({piece.shape[0] for piece in pieces}):
        told = spec_of_piece(spec, rows)
        if (why := target.refuses(told, input_spec)) is not None:
            return why
        if not all(parse_format(term["format"]).rows_apart for term in told["terms"]):
            return f"{told['terms'][0]['format']}: one scale serves rows that are stored apart"
    return None
