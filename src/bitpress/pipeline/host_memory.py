"""The memory of a run on the host, estimated from shapes: a block in work, a matrix outside the blocks, a backward pass."""

import math
from collections.abc import Sequence

from bitpress.calibration.stats import STATISTICS, of_origin
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.gradients import gradient_bytes
from bitpress.pipeline.outer_weights import PlannedOuter
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.recipes import Method

__all__ = ["BASE_BYTES", "activation_bytes", "block_memory", "outer_memory", "squares_of"]

# Resident memory of Python, torch and transformers before any work, measured on Linux with torch 2.13.
BASE_BYTES = 450 * 2**20


def activation_bytes(method: Method, of_sample: int) -> int:
    """Return the bytes of the hidden states of all calibration text, from those of one sample."""
    foreseen = method.observes and method.recipe.calibration.inputs == "original"
    streams = 2 if foreseen or method.keeps_original else 1
    return streams * method.recipe.calibration.drawn * of_sample if method.follows_text else 0


def block_memory(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], stored: dict[str, int], hidden: int
) -> tuple[int, int, int]:
    """Estimate what is held while a block is in work (the process, embeddings and head, the block twice, statistics, hidden states), of that the
    block with its statistics, and the peak, with the largest layer's working set."""
    prefix = f"{model.stack}."
    outer = sum(size for name, size in stored.items() if not name.startswith(prefix))
    by_block: list[int] = [sum(w.weights for w in weights if w.block == i) for i in range(len(model.blocks))]
    block = max(by_block, default=0) * (2 + model.dtype.itemsize + 1)
    # Layers that round their inputs hold their decoded weights beside the block's.
    again = max(
        (sum(w.weights for w in weights if w.block == i and w.method.every_input) for i in range(len(by_block))), default=0
    )
    block += again * model.dtype.itemsize
    # Four copies in float32; low-rank corrections decompose an error in float64.
    bytes_a_weight = 4 * 4 + (2 * 8 if method.corrections else 0)
    largest: int = max((math.prod(w.parameter.shape) for w in weights), default=0) * bytes_a_weight
    # The evaluation computes in float32: two models' outer parts, a block as stored and as computed with, two samples' outputs.
    outer_values: int = sum(p.numel() for name, p in model.model.named_parameters() if not name.startswith(prefix))
    outputs: int = 4 * model.task.output_values(model.model.config, 512)
    proof = BASE_BYTES + 2 * outer_values * 4 + (2 * max(by_block, default=0) + again) * 4 + 3 * outputs
    backward = BASE_BYTES + outer + _backward_bytes(model, method, weights)
    if not method.needs:
        return BASE_BYTES + outer + block, block, max(BASE_BYTES + outer + block + largest, backward, proof)
    widths = {w.parameter.shape[1] for w in weights if w.block == 0}
    positions = model.task.positions(model.model.config, method.recipe.calibration.length)
    held_out = positions * method.recipe.calibration.held_out * model.dtype.itemsize
    grams = sum(n * n * 4 * (1 + squares_of(model, method)) + n * held_out for n in widths)
    factor = 3 * max(widths, default=0) ** 2 * 8
    widest = max((max(w.parameter.shape) for w in weights), default=0)
    batch = method.recipe.batch * positions * widest * 4 * 4
    held = BASE_BYTES + outer + block + grams + hidden
    return held, block + grams, max(held + max(largest + factor, batch), backward, proof)


def outer_memory(model: StreamedModel, outer: Sequence[PlannedOuter], stored: dict[str, int], hidden: int) -> int:
    """Estimate the memory of compressing a matrix outside the blocks: five copies in float32, and its gram with what is solved of it."""
    kept = sum(size for name, size in stored.items() if not name.startswith(f"{model.stack}."))

    def work(found: PlannedOuter) -> int:
        rows, columns = found.planned.parameter.shape
        return rows * columns * 4 * 5 + (columns**2 * (4 + 3 * 8) if found.last else 0)

    return BASE_BYTES + kept + hidden + max(map(work, outer), default=0)


def squares_of(model: StreamedModel, method: Method) -> int:
    """Return how many statistics of the size of a gram are held for each input."""
    heads = getattr(model.model.config.get_text_config(), "num_key_value_heads", None) or 1
    shapes = [STATISTICS[name].shape for name in method.needs]
    return max(1, sum((heads if shape[0] == "heads" else 1) for shape in shapes if shape[-2:] == ("in", "in")))


def _backward_bytes(model: StreamedModel, method: Method, weights: Sequence[PlannedWeight]) -> int:
    """Estimate the memory of a backward pass: the whole model, a sum of squares beside it, and for one sample the states between
    blocks, a block's backward pass and the loss over the outputs."""
    if not of_origin(method.needs, "loss") and not method.options:
        return 0
    config, length = model.model.config, method.recipe.calibration.length
    positions = model.task.positions(config, length)
    whole = sum(w.weights for w in weights) * model.dtype.itemsize + gradient_bytes(
        method.needs, [w.parameter for w in weights]
    )
    states = len(model.blocks) * positions * model.width * model.dtype.itemsize
    first = [w for w in weights if w.block == 0]
    back = sum(w.weights * 8 + positions * sum(w.parameter.shape) * 8 for w in first)
    return int(whole + states + back + 4 * model.task.output_values(config, length) * 4)
