"""What learning blocks by gradients will take: parameters, memory and time, from shapes alone.

    memory of a block   every learned tensor with its best state, its gradient and what the optimiser keeps; `COPIES` of every weight that is
                        learned, in float32; what products keep for the gradient of one batch
    time of a block     `steps` times the products of a batch forward and back, and a step of every weight's parametrisation, measured

Held-out windows go through the block once more than `checks` says.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitpress.formats import Format
from bitpress.formats.grids.grid import StoredParam
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import Method, Named
from bitpress.tuning.learned import LearnedTerm, Start
from bitpress.tuning.learned_maps import MapTuning
from bitpress.tuning.tuner import Tuning

__all__ = ["Learning", "begin_sample", "plan_learning", "served_by"]

# Rows of the samples whose learned tensors are counted: these are the same for every row, but for those of the whole weight.
ROWS = 64
# Float32 tensors of a weight's size beside the learned ones: its target, values, steps, codes, decoded and mapped values, and gradients.
COPIES = 10


@dataclass(frozen=True)
class Learning:
    """The most that learning one block takes.

    fixed     bytes whatever the batch is, the process included; `window` bytes for every window of a batch of `batch` windows
    others    the peak of everything else of the run
    scarce    a sentence for every tuning that learns more parameters in a span than calibration has values to learn from
    """

    name: str
    batch: int
    fixed: int
    window: int
    others: int
    scarce: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.fixed + self.batch * self.window

    def advice(self, most: int) -> str | None:
        """Say which batch fits if the process may have `most` bytes; None where the batch is not what is too large."""
        fits = (most - self.fixed) // max(self.window, 1)
        if self.peak <= most or self.others > most or fits < 1:
            return None
        return (
            f"{self.name} takes {self.window:,} bytes for every window of a step: batches of {fits} fit, in place of {self.batch} "
            f"(tuning: [{{name: {self.name}, batch: {fits}}}])."
        )


def plan_learning(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], base: int, others: int
) -> Learning | None:
    """Plan what a method learns; None if that is nothing. `base` are bytes that are there while it does: the process, the block, statistics,
    hidden states."""
    if not method.tunings or not weights:
        return None
    blocks = [[w for w in weights if w.block == i] for i in sorted({w.block for w in weights})]
    found = []
    for named in method.tunings:
        sizes = [_span(model, method, named, own, base) for own in blocks]
        fixed, window = max(sizes)
        batch = min(named.part.batch, method.recipe.calibration.samples) if named.part.span == "block" else 0
        found.append(Learning(named.name, batch, fixed, window, others, ()))
    scarce = tuple(text for named in method.tunings if (text := _scarce(model, method, named, blocks)) is not None)
    most = max(found, key=lambda one: one.peak)
    return Learning(most.name, most.batch, most.fixed, most.window, others, scarce)


def served_by(named: Named[Tuning], weights: Sequence[PlannedWeight]) -> list[tuple[PlannedWeight, Format]]:
    """Return the weights whose codes a tuning learns, with their formats."""
    pairs = [(w, w.format) for w in weights if not w.parameter.experts]
    return [(w, fmt) for w, fmt in pairs if isinstance(fmt, Format) and is_served(named.part.serves, fmt)]


def begin_sample(tuning: Tuning, fmt: Format, rows: int, cols: int) -> LearnedTerm | None:
    """Return what is learned of a made-up weight; of its input's map what others may share with it."""
    down, across = fmt.block_grid((rows, cols))

    def values(p: StoredParam) -> torch.Tensor:
        shape = (down, across, *p.shape) if p.scope == "block" else p.shape
        return torch.zeros(shape) if p.kind == "code" else torch.full(shape, 0.01)

    params = {p.name: values(p) for p in fmt.grid.params}
    generator = torch.Generator().manual_seed(0)
    codes = torch.zeros(
        rows // fmt.rows_per_code, cols // fmt.grid.span, dtype=torch.uint8 if fmt.grid.code_bits <= 8 else torch.int32
    )
    start = Start(torch.randn(rows, cols, generator=generator) * 0.02, fmt, codes, params, fmt.stored(params))
    return tuning.begin_alone(start) if isinstance(tuning, MapTuning) else tuning.begin(start)


def _learned(model: StreamedModel, named: Named[Tuning], weights: Sequence[PlannedWeight]) -> tuple[int, int]:
    """Return the numbers of learned parameters and of the weights that they stand for."""
    pairs = [(w.parameter.shape, fmt) for w, fmt in served_by(named, weights)]
    counts = [_count(named.part, fmt, shape) for shape, fmt in pairs]
    vectors = 0
    if named.part.norms and weights:
        block = model.blocks[weights[0].block]
        vectors = sum(p.numel() for p in block.parameters() if p.ndim == 1)
    return sum(counts) + vectors, sum(s[0] * s[1] for (s, _), n in zip(pairs, counts, strict=True) if n)


@functools.cache
def _count(tuning: Tuning, fmt: Format, shape: tuple[int, int]) -> int:
    """Count the learned parameters of a weight: of samples of two heights, which tell those of a row from those of the whole weight."""
    rows, cols = shape

    def of(height: int) -> int:
        codes = begin_sample(tuning, fmt, height, cols)
        return 0 if codes is None else sum(leaf.tensor.numel() for leaf in codes.leaves())

    if rows <= 4 * ROWS or fmt.block.rows == "all":
        return of(rows)
    few, more = of(2 * ROWS), of(4 * ROWS)
    return few + (more - few) * (rows - 2 * ROWS) // (2 * ROWS)


def _span(
    model: StreamedModel, method: Method, named: Named[Tuning], weights: Sequence[PlannedWeight], base: int
) -> tuple[int, int]:
    """Return the bytes of learning a block whatever the batch is, and those of each window."""
    tuning = named.part
    states = 3 if tuning.optimizer == "sign" else 5
    if tuning.span == "layer":
        alone = [_learned(model, named, [w]) for w in weights]
        return base + 4 * max(states * learned + COPIES * size for learned, size in alone), 0
    learned, size = _learned(model, named, weights)
    positions = model.task.positions(model.model.config, method.recipe.calibration.length)
    kept = sum(sum(w.parameter.shape) for w in weights if not w.parameter.experts) * 2 * model.dtype.itemsize
    return base + 4 * (states * learned + COPIES * size), positions * (kept + 6 * 4 * model.width)


def _scarce(
    model: StreamedModel, method: Method, named: Named[Tuning], blocks: Sequence[Sequence[PlannedWeight]]
) -> str | None:
    """Say that a span has more parameters than calibration has values to learn them from: the outputs of all its tokens."""
    calibration = method.recipe.calibration
    tokens = calibration.samples * model.task.positions(model.model.config, calibration.length)
    if named.part.span == "layer":
        spans = [(_learned(model, named, [w])[0], tokens * w.parameter.shape[0]) for own in blocks for w in own]
    else:
        spans = [(_learned(model, named, own)[0], tokens * model.width) for own in blocks]
    learned, values = max(spans, key=lambda span: span[0] / span[1])
    if learned <= values:
        return None
    return (
        f"{named.name} learns {learned:,} parameters of a {named.part.span}, from {tokens:,} calibration tokens with {values:,} output values: "
        "it can fit the text instead of the model; use more samples or learn less"
    )
