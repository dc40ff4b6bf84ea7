"""The matrices outside the blocks: the table of embeddings, whose rows are looked up, and the output head, which is multiplied.

Embeddings are compressed before the calibration text goes through the blocks, which then see what the compressed table gives. A head,
and a table that is tied to it, are compressed after the blocks, by statistics of the hidden states that reach the head.

A lookup reads one row, so rows of a table may share nothing. Then each row is rounded by itself, and how often its token occurs changes
no code.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitpress.calibration import Stats
from bitpress.checkpoints.parameter import WeightParameter, stem
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import Format
from bitpress.models.linears import find_outer, skipping
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import LayerRow
from bitpress.pipeline.rounded_inputs import Look, choose_input, refused_inputs
from bitpress.pipeline.weights import CompressedBlock, WeightCompressor
from bitpress.quantizers.quantizer import check_served
from bitpress.recipes import OUTER, Method
from bitpress.recipes.recipe import OuterWeights
from bitpress.runtime.native.assemble import MOST_HEAD_COST, ROUNDED_TOGETHER

__all__ = ["PlannedOuter", "compress_outer", "compress_tables", "plan_outer"]

# In the place of a block's number.
OUTSIDE = -1


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
    own = _of_one_matrix(method) if found.tied else dict(method.outer)
    planned: list[PlannedOuter] = []
    for key, value in own.items():
        matrix, auto = matrices[key], key in method.auto
        if matrix is None and not auto:
            raise UsageError(f"{key}: {type(model.model).__name__} has no matrix that this key could name; leave it out.")
        if matrix is None or _is_skipped(key, matrix, value, model, method):
            continue
        looked_up = found.tied or key == "embeddings"
        try:
            one = _planned(key, matrix, value, looked_up=looked_up, auto=auto)
            for why in refused_inputs(model, [one.planned]):
                raise FormatError(f"{key}: {why}")
            planned.append(one)
        except FormatError:
            if not auto:
                raise
            # A quantizer that does not suit a table: rounding does, or nothing.
            if key == "head" and "embeddings" in method.auto:
                with contextlib.suppress(FormatError):
                    planned.append(_planned(key, matrix, method.outer["embeddings"], looked_up=looked_up, auto=True))
    return tuple(planned)


def _of_one_matrix(method: Method) -> dict[str, Method]:
    """Return what the recipe says of tied embeddings under one key: what is said of one counts for both. Raises UsageError."""
    said = {"embeddings": method.recipe.embeddings, "head": method.recipe.head}
    named = {key: value for key, value in said.items() if isinstance(value, OuterWeights)}
    if "keep" in said.values():
        if named:
            raise UsageError(
                f"{next(iter(named))} names a format and the other key says keep, and both are one matrix in this model (tied)."
            )
        return {}
    if not named:
        return {"head": method.outer["head"]} if "head" in method.outer else dict(method.outer)
    formats = {key: method.outer[key].format.name for key in named}
    quantizers = {key: value.quantizer for key, value in named.items() if value.quantizer is not None}
    if len(set(formats.values())) > 1 or (len(quantizers) > 1 and quantizers["embeddings"] != quantizers["head"]):
        told = " and ".join(f"{key} {name}" for key, name in formats.items())
        raise UsageError(f"{told}: both are one matrix in this model (tied), so both must say the same; leave one out.")
    key = next(iter(quantizers)) if len(quantizers) == 1 else "head" if "head" in named else "embeddings"
    return {key: method.outer[key]}


def _is_skipped(key: str, matrix: WeightParameter, own: Method, model: StreamedModel, method: Method) -> bool:
    """Return whether `skip` leaves a matrix out, under any of its names. Raises UsageError where the recipe also names a format for it."""
    aliases = [alias for alias, original in dict(model.model.all_tied_weights_keys).items() if original == matrix.name]
    names = [name for full in (matrix.name, *aliases) for name in (stem(full), full)]
    for override in method.recipe.overrides:
        if override.match in names:
            raise UsageError(f"overrides: {override.match!r} is in no block; what it is stored in goes under the key {key}.")
    pattern = skipping(names, method.recipe.skip)
    if pattern is None or (pattern == "*" and key not in method.auto):  # "*" is said of the blocks
        return False
    if key not in method.auto:
        raise UsageError(
            f"{key} {own.format.name} and skip {pattern!r} contradict each other for {matrix.stem}; leave one out."
        )
    return True


def compress_outer(
    found: PlannedOuter, original: torch.Tensor, stats: Stats | None, look: Look | None = None, *, strict: bool = False
) -> tuple[CompressedBlock, torch.Tensor]:
    """Compress a matrix; return it as a block of its own, and its decoded values. `stats` are those of the head's input, and
    `look` runs the calibration text through the head where its input has stored parameters."""
    compressor = WeightCompressor(found.method, strict=strict)
    known = {} if stats is None else {found.planned.parameter.stem: stats}
    compressed, decoded = compressor.compress(found.planned, original, known, None)
    inputs = found.planned.method.inputs
    if inputs is not None:
        chosen, always_zero = choose_input(compressed.parameter.name, inputs, compressed.weight, look)
        compressed = compressed.with_input(chosen, always_zero=always_zero)
    made = CompressedBlock()
    # What nobody asked for may cost a head as much as the engine's own rounding may.
    if found.auto and stats is not None and (cost := _head_cost(original, decoded, stats)) > MOST_HEAD_COST:
        made.kept[found.planned.parameter.name] = original
        made.notes.append(_kept_row(compressed.row, original, cost))
        return made, original
    made.put_(compressed)
    return made, decoded


def _head_cost(original: torch.Tensor, decoded: torch.Tensor, stats: Stats) -> float:
    """Estimate the KL divergence that a compressed head costs, in nats a token.

    An error of a logit has the variance e gram e' over tokens, e the error of its row; small independent errors of variance v cost v / 2.
    """
    gram, total = stats.need_gram("head"), 0.0
    for rows, others in zip(original.split(ROUNDED_TOGETHER), decoded.split(ROUNDED_TOGETHER), strict=True):
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
    if planned.method.inputs is not None and looked_up:
        raise FormatError(
            f"{where}: rows of a tied matrix are looked up too, and its product cannot round its input; leave out inputs."
        )
    if quantizer.part.keeps_map and looked_up:
        raise FormatError(f"{where}: {quantizer.name} keeps a map with the matrix, and a row is looked up without one.")
    return PlannedOuter(key, planned, method, last=key == "head" and (bool(method.needs) or method.observes), auto=auto)
