"""What learning by gradients will take: parameters, memory and time, from shapes alone.

    memory of a block    every learned tensor with its best state, its gradient and what the optimiser keeps; `COPIES` of every weight that is
                         learned, in float32; what products keep for the gradient of one batch
    memory of windows    the same of every block, but the copies of one; the other blocks as loaded, with their statistics; the states of the text
                         at the beginning and behind the blocks ahead, and between blocks for one batch
    memory of a network  every block packed, with what is held of each learned weight; the copies of one block; the original's likeliest tokens
                         and the states before the first block for all text, those between blocks for one batch, the logits of one text
    time of a block      `steps` times the products of a batch forward and back, and a step of every weight's parametrisation, measured

Held-out windows go through the span once more than `checks` says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.host_memory import BASE_BYTES
from bitpress.pipeline.learning_sample import Share, learned_share
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.windows import windows_of
from bitpress.recipes import Method, Named
from bitpress.tuning.learned_maps import MapTuning
from bitpress.tuning.tuner import Tuning
from bitpress.tuning.wide_objectives import TOP

__all__ = ["Learning", "plan_learning"]

# Float32 tensors of a weight's size beside the learned ones: its target, values, steps, codes, decoded and mapped values, and gradients.
COPIES = 10
# Of the logits of one text: themselves, in float32, their logarithms, the gradients of both.
LOGITS = 6


@dataclass(frozen=True)
class Learning:
    """The most that learning one span takes.

    fixed     bytes whatever the batch is, the process included; `window` bytes for every window of a batch of `batch` windows
    others    the peak of everything else of the run
    scarce    a sentence for every tuning that learns more parameters in a span than calibration has values to learn from
    learned   by the tunings in their order, the most parameters that one learns in a span
    beside    of `fixed`, what learning takes beside what is there anyway
    """

    name: str
    span: str
    batch: int
    fixed: int
    window: int
    others: int
    scarce: tuple[str, ...]
    learned: tuple[int, ...]
    beside: int

    @property
    def peak(self) -> int:
        return self.fixed + self.batch * self.window

    def advice(self, most: int) -> str | None:
        """Say which batch fits if the process may have `most` bytes; None where the batch is not what is too large."""
        fits = (most - self.fixed) // max(self.window, 1)
        if self.peak <= most or self.others > most:
            return None
        if fits < 1 and self.span in ("windows", "network"):
            return (
                f"{self.name} holds {'all blocks' if self.span == 'network' else 'its window of blocks'} at once: {self.fixed:,} bytes, and "
                f"{self.window:,} for every window of a step; leave it out, or learn {'windows or ' if self.span == 'network' else ''}blocks."
            )
        if fits < 1:
            return None
        return (
            f"{self.name} takes {self.window:,} bytes for every window of a step: {fits} fit, in place of {self.batch} "
            f"(tuning: [{{name: {self.name}, batch: {fits}}}])."
        )


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the arithmetic takes.

    base      of what is there while a block is learned: the process, the block, statistics, hidden states
    block     of a block as loaded, with its statistics; `outer` of what is in no block
    packed    of all compressed blocks
    """

    base: int
    block: int
    outer: int
    packed: int


@dataclass(frozen=True)
class _Span:
    """Learned parameters of a span, bytes whatever the batch is, and of each window of a batch."""

    learned: int
    fixed: int
    window: int


def plan_learning(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], base: int, block: int, others: int
) -> Learning | None:
    """Plan what a method learns; None if that is nothing. `base` are bytes that are there while it does: the process, the block, statistics,
    hidden states; `block` those of a block with its statistics among them."""
    if not method.tunings or not weights:
        return None
    outer = sum(p.numel() for name, p in model.model.named_parameters() if not name.startswith(f"{model.stack}."))
    sizes = _Sizes(base, block, 2 * outer * model.dtype.itemsize, sum(w.nbytes for w in weights))
    found, learned = [], []
    for named in method.tunings:
        spans = _spans(model, method, named, weights, sizes)
        most = max(spans, key=lambda span: (span.fixed, span.window))
        batch = 0 if named.part.span == "layer" else min(named.part.batch, method.recipe.calibration.samples)
        learned.append(max(span.learned for span in spans))
        found.append((named, batch, most))
    scarce = tuple(text for named in method.tunings if (text := _scarce(model, method, named, weights)) is not None)
    named, batch, most = max(found, key=lambda one: one[2].fixed + one[1] * one[2].window)
    beside = most.fixed - (BASE_BYTES if named.part.span == "network" else base)
    return Learning(named.name, named.part.span, batch, most.fixed, most.window, others, scarce, tuple(learned), beside)


def _by_span(
    model: StreamedModel, method: Method, named: Named[Tuning], weights: Sequence[PlannedWeight]
) -> list[list[list[PlannedWeight]]]:
    """Return the weights of every span, by its blocks."""
    by_block = [[w for w in weights if w.block == i] for i in range(len(model.blocks))]
    if named.part.span == "network":
        return [by_block]
    if named.part.span == "windows":
        return [[by_block[i] for i in window.blocks] for window in windows_of(method, weights, len(by_block))]
    return [[own] for own in by_block if own]


def _learned(model: StreamedModel, named: Named[Tuning], blocks: Sequence[Sequence[PlannedWeight]]) -> int:
    """Return the number of learned parameters: of codes, of terms and maps beside them, of norms and biases."""
    shares = sum(learned_share(named, w).learned for own in blocks for w in own)
    if not named.part.norms:
        return shares
    compressed = {w.parameter.name for own in blocks for w in own}
    places = {own[0].block for own in blocks if own}
    return shares + sum(
        p.numel()
        for i in places
        for name, p in model.blocks[i].named_parameters()
        if p.ndim == 1 and f"{model.block_name(i)}.{name}" not in compressed
    )


def _spans(
    model: StreamedModel, method: Method, named: Named[Tuning], weights: Sequence[PlannedWeight], sizes: _Sizes
) -> list[_Span]:
    """Return what every span of a tuning takes."""
    tuning = named.part
    states = 3 if tuning.optimizer == "sign" else 5
    if tuning.span == "layer":
        # Experts are learned one by one.
        each = [(learned_share(named, w), max(w.parameter.experts, 1)) for w in weights]
        return [
            _Span(s.learned // n, sizes.base + 4 * (states * (s.learned // n) + COPIES * (s.values // n)), 0) for s, n in each
        ]
    calibration, config = method.recipe.calibration, model.model.config
    positions = model.task.positions(config, calibration.length)
    state = positions * model.width * model.dtype.itemsize
    found = []
    for blocks in _by_span(model, method, named, weights):
        learned = _learned(model, named, blocks)
        shares: list[list[Share]] = [[learned_share(named, w) for w in own] for own in blocks]
        kept = max(sum(sum(w.parameter.shape) for w in own if not w.parameter.experts) for own in blocks)
        inside = positions * (kept * 2 * model.dtype.itemsize + 6 * 4 * model.width)
        largest = max(sum(s.values for s in own) for own in shares)
        fixed = 4 * (states * learned + COPIES * largest) + _choosing(tuning, [w for own in blocks for w in own])
        if len(blocks) == 1 and not tuning.ahead and tuning.span != "network":
            found.append(_Span(learned, sizes.base + fixed, inside))
            continue
        held = sum(s.held for own in shares for s in own) - max(sum(s.held for s in own) for own in shares)
        through = len(blocks) + tuning.ahead
        if tuning.span == "windows":
            copies = (len(blocks) > 1) + bool(tuning.overlap) + (tuning.targets == "same") + tuning.ahead
            fixed += sizes.base + held + (through - 1) * sizes.block + copies * calibration.drawn * state
            found.append(_Span(learned, fixed, inside + through * state))
            continue
        still = sum(w.weights for own in blocks for w in own) - sum(s.values for own in shares for s in own)
        texts = calibration.drawn * (state + positions * TOP * 8 * (tuning.loss == "kl-top"))
        logits = LOGITS * 4 * model.task.output_values(config, calibration.length)
        fixed += BASE_BYTES + sizes.outer + sizes.packed + held + still * model.dtype.itemsize + texts + logits
        found.append(_Span(learned, fixed, inside + through * state))
    return found


def _choosing(tuning: Tuning, weights: Sequence[PlannedWeight]) -> int:
    """Return the bytes that the recipe's quantizer takes to choose the codes of the largest weight behind a learned map: four copies of the
    weight in float32, the rescaled gram, and what is solved of it in float64."""
    if not isinstance(tuning, MapTuning) or tuning.codes == "nearest":
        return 0
    return max((16 * math.prod(w.parameter.shape) + w.parameter.shape[1] ** 2 * (4 + 3 * 8) for w in weights), default=0)


def _scarce(model: StreamedModel, method: Method, named: Named[Tuning], weights: Sequence[PlannedWeight]) -> str | None:
    """Say that a span has more parameters than calibration has values to learn them from: the outputs of all its tokens, or what the original
    says of them."""
    calibration, config = method.recipe.calibration, model.model.config
    tokens = calibration.samples * model.task.positions(config, calibration.length)
    if named.part.span == "layer":
        spans = [(learned_share(named, w).learned, tokens * w.parameter.shape[0]) for w in weights]
    else:
        # A text's own next tokens are one number each; targets of the original are at least as many as the hidden states hold.
        told = 1 if named.part.loss == "cross-entropy" else model.width
        spans = [(_learned(model, named, blocks), tokens * told) for blocks in _by_span(model, method, named, weights)]
    learned, values = max(spans, key=lambda span: span[0] / span[1])
    if learned <= values:
        return None
    noun = {"windows": "window of blocks"}.get(named.part.span, named.part.span)
    return (
        f"{named.name} learns {learned:,} parameters of a {noun}, from {tokens:,} calibration tokens with {values:,} output values: "
        "it can fit the text instead of the model; use more samples or learn less"
    )
