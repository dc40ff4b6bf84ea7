"""The matrices outside the blocks: the table of embeddings, whose rows are looked up, and the output head, which is multiplied.

Embeddings are compressed before the calibration text goes through the blocks, which then see what the compressed table gives. A head,
and a table that is tied to it, are compressed after the blocks, by statistics of the hidden states that reach the head.

A lookup reads one row, so rows of a table may share nothing. Then each row is rounded by itself, and how often its token occurs changes
no code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitpress.calibration import Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import Format
from bitpress.models.linears import find_outer
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.weights import CompressedBlock, WeightCompressor
from bitpress.quantizers.quantizer import check_served
from bitpress.recipes import OUTER, Method

__all__ = ["PlannedOuter", "compress_outer", "compress_tables", "plan_outer"]

# In the place of a block's number.
OUTSIDE = -1


@dataclass(frozen=True)
class PlannedOuter:
    """A matrix outside the blocks.

    key     the recipe's key that it is compressed by
    method  what that key says, as a recipe of its own
    last    whether it is compressed after the blocks
    """

    key: str
    planned: PlannedWeight
    method: Method
    last: bool


def plan_outer(model: StreamedModel, method: Method) -> tuple[PlannedOuter, ...]:
    """Plan the matrices that the recipe names. Raises UsageError for a model that has none, FormatError for a format that does not suit."""
    if not method.outer:
        return ()
    found = find_outer(model.model)
    matrices = dict(zip(OUTER, (found.embeddings, found.head), strict=True))
    for key in method.outer:
        if matrices[key] is None:
            raise UsageError(f"{key}: {type(model.model).__name__} has no matrix that this key could name; leave it out.")
    if not found.tied:
        return tuple(_planned(key, matrices[key], own, looked_up=key == "embeddings") for key, own in method.outer.items())
    if len({own.format.name for own in method.outer.values()}) > 1:
        told = " and ".join(f"{key} {own.format.name}" for key, own in method.outer.items())
        raise UsageError(f"{told}: both are one matrix in this model (tied), so their formats must be the same; leave one out.")
    key = "head" if "head" in method.outer else "embeddings"
    return (_planned(key, found.embeddings, method.outer[key], looked_up=True),)


def compress_outer(
    found: PlannedOuter, original: torch.Tensor, stats: Stats | None, *, strict: bool = False
) -> tuple[CompressedBlock, torch.Tensor]:
    """Compress a matrix; return it as a block of its own, and its decoded values. `stats` are those of the head's input."""
    compressor = WeightCompressor(found.method, strict=strict)
    known = {} if stats is None else {found.planned.parameter.stem: stats}
    compressed, decoded = compressor.compress(found.planned, original, known, None)
    made = CompressedBlock()
    made.put_(compressed)
    return made, decoded


def compress_tables(
    outer: tuple[PlannedOuter, ...], tensors: Mapping[str, torch.Tensor], *, strict: bool = False
) -> tuple[CompressedBlock, dict[str, torch.Tensor]]:
    """Compress what comes before the blocks; return it with every other tensor that is stored now, and the decoded values by name."""
    made, decoded = CompressedBlock(), {}
    for found in outer:
        name = found.planned.parameter.name
        if not found.last:
            one, decoded[name] = compress_outer(found, tensors[name], None, strict=strict)
            made.put_(one.parameters[name])
    later = {found.planned.parameter.name for found in outer}
    made.kept = {name: tensor for name, tensor in tensors.items() if name not in later}
    return made, decoded


def _planned(key: str, parameter: WeightParameter | None, method: Method, *, looked_up: bool) -> PlannedOuter:
    assert parameter is not None
    planned = PlannedWeight(parameter, method.for_layer(parameter.stem), OUTSIDE)
    fmt, quantizer = planned.format, planned.method.quantizer
    where = f"{key} {fmt.name}: {parameter.stem}"
    if not isinstance(fmt, Format) or (looked_up and not fmt.rows_apart):
        raise FormatError(
            f"{where}: a token's row cannot be read by itself in this format; take one with scales per row or group, such as int8-row."
        )
    try:
        fmt.block_grid(parameter.shape)
        check_served(quantizer.name, quantizer.part.serves, fmt)
        quantizer.part.stored_bytes(fmt, parameter.shape)
    except BitpressError as error:
        raise FormatError(f"{where}: {error}") from error
    if quantizer.part.keeps_map and looked_up:
        raise FormatError(f"{where}: {quantizer.name} keeps a map with the matrix, and a row is looked up without one.")
    return PlannedOuter(key, planned, method, last=key == "head" and bool(method.needs))
