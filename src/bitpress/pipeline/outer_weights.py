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
from bitpress.models.linears import find_outer, skipping
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import LayerRow
from bitpress.pipeline.weights import CompressedBlock, WeightCompressor
from bitpress.quantizers.quantizer import check_served
from bitpress.recipes import OUTER, Method

__all__ = ["PlannedOuter", "compress_outer", "compress_tables", "plan_outer"]

# In the place of a block's number.
OUTSIDE = -1
# Nats a token that a head may lose by what nobody asked for ("auto"); one that would lose more stays as stored.
MOST_HEAD_COST = 0.001
ROWS_TOGETHER = 4096


@dataclass(frozen=True)
class PlannedOuter:
    """A matrix outside the blocks.

    key     the recipe's key that it is compressed by
    method  what that key says, as a recipe of its own
    last    whether it is compressed after the blocks
    auto    whether bitpress chose the format
    """

    key: str
    planned: PlannedWeight
    method: Method
    last: bool
    auto: bool


def plan_outer(model: StreamedModel, method: Method) -> tuple[PlannedOuter, ...]:
    """Plan the matrices that the recipe names. Raises UsageError for a model that has none, FormatError for a format that does not suit.

    What the recipe leaves to bitpress ("auto") raises nothing: a matrix that cannot take it stays as stored.
    """
    if not method.outer:
        return ()
    found = find_outer(model.model)
    matrices = dict(zip(OUTER, (found.embeddings, found.head), strict=True))
    own = dict(method.outer)
    if found.tied and method.auto != set(OUTER):  # what one key says of a matrix, or that it is kept, counts for the other too
        own = {key: value for key, value in own.items() if key not in method.auto}
    if found.tied and len({value.format.name for value in own.values()}) > 1:
        told = " and ".join(f"{key} {value.format.name}" for key, value in own.items())
        raise UsageError(f"{told}: both are one matrix in this model (tied), so their formats must be the same; leave one out.")
    if found.tied and len(own) > 1:
        del own["embeddings"]
    planned: list[PlannedOuter] = []
    for key, value in own.items():
        matrix, auto = matrices[key], key in method.auto
        if matrix is None and not auto:
            raise UsageError(f"{key}: {type(model.model).__name__} has no matrix that this key could name; leave it out.")
        if matrix is None or (auto and skipping((matrix.stem, matrix.name), method.recipe.skip) is not None):
            continue
        try:
            planned.append(_planned(key, matrix, value, looked_up=found.tied or key == "embeddings", auto=auto))
        except FormatError:
            if not auto:
                raise
    return tuple(planned)


def compress_outer(
    found: PlannedOuter, original: torch.Tensor, stats: Stats | None, *, strict: bool = False
) -> tuple[CompressedBlock, torch.Tensor]:
    """Compress a matrix; return it as a block of its own, and its decoded values. `stats` are those of the head's input."""
    compressor = WeightCompressor(found.method, strict=strict)
    known = {} if stats is None else {found.planned.parameter.stem: stats}
    compressed, decoded = compressor.compress(found.planned, original, known, None)
    made = CompressedBlock()
    if found.auto and stats is not None and (cost := head_cost(original, decoded, stats)) > MOST_HEAD_COST:
        made.kept[found.planned.parameter.name] = original
        made.notes.append(_kept_row(compressed.row, original, cost))
        return made, original
    made.put_(compressed)
    return made, decoded


def head_cost(original: torch.Tensor, decoded: torch.Tensor, stats: Stats) -> float:
    """Estimate the KL divergence that a compressed head costs, in nats a token.

    An error of a logit has the variance e gram e' over tokens, e the error of its row; small independent errors of variance v cost v / 2.
    """
    gram, total = stats.need_gram("head"), 0.0
    for rows, others in zip(original.split(ROWS_TOGETHER), decoded.split(ROWS_TOGETHER), strict=True):
        error = rows.float() - others.float()
        total += float((error @ gram).mul_(error).sum())
    return total / original.shape[0] / 2


def _kept_row(row: LayerRow, original: torch.Tensor, cost: float) -> LayerRow:
    dtype = str(original.dtype).removeprefix("torch.")
    note = f"kept in {dtype}: {row.format} would cost about {cost:.2g} nats a token; --head {row.format} asks for it"
    bits = 8.0 * original.element_size()
    return row.model_copy(
        update={
            "format": dtype,
            "bytes": original.nbytes,
            "bits_per_weight": bits,
            "error": 0.0,
            "calibrated": False,
            "notes": [note],
        }
    )


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


def _planned(key: str, parameter: WeightParameter, method: Method, *, looked_up: bool, auto: bool) -> PlannedOuter:
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
    return PlannedOuter(key, planned, method, last=key == "head" and bool(method.needs), auto=auto)
