"""Compress one block after another: measure its inputs, scale channels, quantize, and pass on the outputs of the compressed block.

This is the only place where calibration, searches over a block and the compression of weights meet. Everything random is drawn before,
so the same inputs give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.corrections.bias import BiasCorrection
from bitpress.errors import NumericsError
from bitpress.formats import CompressedWeight
from bitpress.models.linears import list_weights
from bitpress.models.walk import LoadedBlock
from bitpress.pipeline.biases import correct_biases_
from bitpress.pipeline.calibration_stream import HEAD_STATISTICS, CalibrationStream, Measured, output_gram_of
from bitpress.pipeline.channel_scaling import Rescaled, check_kept, rescale_block_
from bitpress.pipeline.layer_choice import Settled, settle_layers
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import TunedSpan
from bitpress.pipeline.rounded_inputs import SeenChannels, choose_operands
from bitpress.pipeline.shifting import BlockShifts
from bitpress.pipeline.tuning import Held, SpanTuner, Targets, Tuned
from bitpress.pipeline.weights import CompressedBlock, WeightCompressor
from bitpress.progress import Progress, Stepwise
from bitpress.recipes import Method
from bitpress.transforms.shift import Shift

__all__ = ["BlockCompressor", "OpenBlock", "check_early", "packed_weights"]


@dataclass(frozen=True)
class OpenBlock:
    """A block that is compressed and still open: `measured` are the statistics of its weights' inputs before scales, which `scales` holds.

    learned   the statistics of inputs behind what was learned of the block, by the names of single weights
    folded    the factors of weights' entries that came with it, by the names of parameters
    """

    block: LoadedBlock
    made: CompressedBlock
    planned: tuple[PlannedWeight, ...]
    measured: Mapping[str, Stats]
    scales: Rescaled | None
    seen: dict[str, SeenChannels]
    learned: dict[str, Stats] = field(default_factory=dict)
    folded: dict[str, Float[torch.Tensor, "out in"]] = field(default_factory=dict)

    @property
    def weights(self) -> list[PlannedWeight]:
        """The weights that are compressed."""
        return [p for p in self.planned if p.parameter.name in self.made.parameters]

    def stats(self) -> dict[str, Stats]:
        """Return the statistics of the inputs that the compressed weights have."""
        return self.learned or {name: _of_stored(name, found, self.scales) for name, found in self.measured.items()}


class BlockCompressor:
    """A visitor that compresses the weights of every block by a method; `made` is the block in work.

    stream       the calibration text, started already, with what `measure_gradients` found
    measured     returns the statistics of a block from an earlier pass over the uncompressed model: then no text is run, and if the
                 method needs no gram, a gram among them is used only to measure errors
    looked_at    whether later visitors run the block, so that its compressed weights must be loaded
    progress     hears of the steps of learning
    joined       whether the block in work is committed with the next one only
    beside_same  what the uncompressed blocks make of the hidden states that the compressed ones were given, where windows are learned by it
    """

    def __init__(
        self,
        stream: CalibrationStream,
        method: Method,
        planned: Sequence[PlannedWeight],
        *,
        strict: bool = False,
        measured: Callable[[int], Measured] | None = None,
        looked_at: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.stream, self.method, self.planned, self.looked_at = stream, method, planned, looked_at
        self.measured, self.progress = measured, progress
        self.weights = WeightCompressor(method, strict=strict)
        self.shifts: BlockShifts | None = None
        self.made = CompressedBlock()
        self.joined = False
        self.beside_same: torch.Tensor | None = None

    def visit_(self, block: LoadedBlock) -> None:
        """Compress a block into `made`, and move the calibration text past it (not past the last block where nothing needs its outputs)."""
        opened = self.open_(block)
        self.close_(opened)
        follows = self.method.follows_text
        if self._foresees(block):
            self.stream.take_foreseen_()
        elif self.stream.goes_on(block) and follows and not self.stream.follows_original and self.measured is None:
            self.stream.advance_(block.index)

    def _foresees(self, block: LoadedBlock) -> bool:
        stream = self.stream
        return self.method.observes and stream.follows_original and stream.goes_on(block) and self.measured is None

    def open_(self, block: LoadedBlock) -> OpenBlock:
        """Compress a block into `made`, and learn it by itself where the method says so."""
        stream, model, tensors = self.stream, self.stream.model, block.tensors
        needs, follows = self.method.needs, self.method.follows_text
        planned = [p for p in self.planned if p.block == block.index]
        self.made, self.shifts = CompressedBlock(), None
        made = self.made
        sequential = self.method.recipe.calibration.sequential and needs
        # A block without weights to compress has one stage too, in which the uncompressed model's states move on.
        stages = (stream.stages(block.index, planned) if sequential else []) or [planned]
        advances = stream.goes_on(block) and follows and not stream.follows_original and self.measured is None
        foreseen = self._foresees(block)
        if foreseen:  # the observers look at this block's inputs after its statistics are taken
            stream.foresee_(block.index)
        replaced: dict[str, torch.Tensor] = {}
        seen: dict[str, SeenChannels] = {}
        measured: dict[str, Stats] = {}
        scales: Rescaled | None = None
        for stage in stages:
            final = stage is stages[-1]
            measuring = needs or self.measured is not None
            goes_on = stream.goes_on(block) and not foreseen
            settled = Settled(tuple(stage), {})
            stats: dict[str, Stats] = {}
            if measuring:
                stats, scales, settled = self._measure(block, stage, replaced, seen, goes_on=goes_on, final=final)
            measured |= stats if self.method.tunings else {}
            targets = self._targets(block, planned, replaced, scales) if final and self.method.tunings else {}
            for p in settled.planned:
                stream.check_stop()
                name = p.parameter.name
                result, decoded = self.weights.compress(p, tensors[name], stats, scales)
                made.put_(result.with_choice(settled.told.get(p.parameter.stem)))
                if self.looked_at or self.method.observes or (follows and (stream.goes_on(block) or not final)):
                    model.fill_({name: decoded})
                replaced[name] = tensors[name]
            # What is learned by a block's output is learned with everything rounded, the last block's operands of attention too.
            runs = advances or self.looked_at or not final or bool(self.method.tunings)
            self._round_(block, settled.planned, seen, runs=runs)
        opened = OpenBlock(block, made, tuple(planned), measured, scales, seen)
        self._fold_shifts_(opened)
        if (alone := self.method.tunings_of("layer", "block")) and planned:
            tuner = SpanTuner(stream, [block.index], self.held([opened]), stream.hidden, targets)
            self.take_([opened], tuner.tune(alone, packed_weights([opened]), self.heard))
        return opened

    def close_(self, opened: OpenBlock) -> None:
        """Put what is stored beside the compressed weights into the block."""
        block, made = opened.block, opened.made
        compressed = {p.parameter.name for p in opened.planned}
        # Only now, since searches, shifts and learning rewrite the norms and biases that absorb them.
        made.kept = {name: t for name, t in block.tensors.items() if name not in compressed}
        if self.method.searches:
            check_kept(self.stream.model, made.kept)
        if (bias := self.method.only(BiasCorrection)) is not None:
            correct_biases_(self.stream.model, bias, list(opened.planned), block.tensors, made, opened.seen)

    def _fold_shifts_(self, opened: OpenBlock) -> None:
        """Fold the shifts of a block: before it is learned, since what is learned of norms, biases and inputs' maps must see them there."""
        if self.shifts is None or not opened.planned:
            return
        moved = self.shifts.fold_(self.stream.model, opened.planned, opened.block.tensors, opened.made, opened.seen)
        if self.stream.goes_on(opened.block) or self.looked_at or self.method.tunings:
            self.stream.model.set_products_({name: opened.made.parameters[name].layer for name in moved})

    def _round_(
        self, block: LoadedBlock, planned: Sequence[PlannedWeight], seen: Mapping[str, SeenChannels], *, runs: bool
    ) -> None:
        """Choose how the inputs of weights that are compressed now, and the operands of attention, are rounded; if the block still `runs`,
        let it round them."""
        made, model = self.made, self.stream.model
        weights = {p.parameter.name: made.parameters[p.parameter.name].weight for p in planned}
        chosen = choose_operands(self.stream, block.index, planned, weights, self.method, seen)
        made.attention = dict(chosen.attention)
        for name, found in chosen.inputs.items():
            made.put_(made.parameters[name].with_input(found, always_zero=name in chosen.always_zero))
        if runs:
            model.set_products_({name: made.parameters[name].layer for name in chosen.inputs})
            model.set_attention_(made.attention)

    def _targets(
        self,
        block: LoadedBlock,
        planned: Sequence[PlannedWeight],
        replaced: Mapping[str, torch.Tensor],
        scales: Rescaled | None,
    ) -> Targets:
        """Return what the block should give: as the uncompressed model does there, and for the compressed blocks' states before it."""
        stream = self.stream
        wanted = {named.part.targets for named in self.method.tunings_of("block")}
        found = {}
        if "original" in wanted:
            assert stream.beside is not None
            found["original"] = {0: stream.beside}
        if "same" in wanted or self.beside_same is not None:
            plain = dict(replaced)
            for p in planned:  # nothing divides the input of these in the loaded block
                if scales is not None and p.parameter.stem in scales.unfolded:
                    name = p.parameter.name
                    plain[name] = p.parameter.restore(self.weights.unscaled(p, block.tensors[name], scales))
            now = {name: stream.model.model.get_parameter(name).data for name in plain}
            stream.model.fill_(plain)
            with stream.model.unrounded(block.index):
                if "same" in wanted:
                    found["same"] = {0: stream.run_all(block.index)}
                if self.beside_same is not None:
                    self.beside_same = stream.run_all(block.index, self.beside_same)
            stream.model.fill_(now)
        return found

    def held(self, opened: Sequence[OpenBlock]) -> Held:
        """Return what learning holds of blocks that are compressed."""
        originals = dict[str, torch.Tensor]()
        for one in opened:
            for p in one.weights:
                name = p.parameter.name
                original = self.weights.unscaled(p, one.block.tensors[name], one.scales)
                originals[name] = original * one.folded[name] if name in one.folded else original
        kept = {
            name: t
            for one in opened
            for name, t in (one.block.tensors.items() if one.weights else ())  # a block without compressed weights stays
            if name not in one.made.parameters
        }
        stats = {name: found for one in opened for name, found in one.stats().items()}
        rounded = {n: p.input for one in opened for n, p in one.made.parameters.items() if p.input is not None}
        return Held([p for one in opened for p in one.weights], originals, stats, kept, rounded)

    def heard(self, name: str, share: float, loss: float) -> None:
        """Hear of a step of learning."""
        if isinstance(self.progress, Stepwise):
            self.progress.step(name, share, loss=loss)

    def take_(self, opened: Sequence[OpenBlock], tuned: Tuned) -> None:
        """Put what was learned of compressed blocks into them and into the model; the first of them gets the rows of the report."""
        for one in opened:
            tensors = one.block.tensors
            one.learned.update({part: tuned.stats[part] for part in one.measured if part in tuned.stats})
            for p in one.weights:
                name = p.parameter.name
                if (factors := tuned.folded.get(name)) is not None:
                    one.folded[name] = factors
                if name in tuned.weights:
                    made, folded = one.made.parameters[name], one.folded.get(name)
                    result = self.weights.replaced(made, tuned.weights[name], tensors[name], one.measured, one.scales, folded)
                    one.made.put_(result if name not in tuned.inputs else result.with_input(tuned.inputs[name]))
                for text in tuned.notes.get(name, ()):
                    one.made.put_(one.made.parameters[name].with_note(text))
                for text in tuned.fallbacks.get(name, ()):
                    if self.weights.strict:
                        raise NumericsError(f"{p.parameter.stem}: {text} (an error because of --strict).")
                    one.made.put_(one.made.parameters[name].with_fallback(text))
            tensors.update({name: t for name, t in tuned.vectors.items() if name in tensors})
            decoded = {
                p.parameter.name: p.parameter.restore(one.made.parameters[p.parameter.name].weight.dequantize())
                for p in one.weights
            }
            self.stream.model.fill_({**decoded, **{n: t for n, t in tensors.items() if n not in one.made.parameters}})
            self.stream.model.set_products_({n: p.layer for n, p in one.made.parameters.items() if p.input is not None})
        opened[0].made.tuned = [*opened[0].made.tuned, *tuned.rows]
        check_early(tuned.rows, strict=self.weights.strict)

    def _measure(
        self,
        block: LoadedBlock,
        planned: Sequence[PlannedWeight],
        replaced: Mapping[str, torch.Tensor],
        seen: dict[str, SeenChannels],
        *,
        goes_on: bool,
        final: bool,
    ) -> tuple[dict[str, Stats], Rescaled, Settled]:
        """Collect statistics of every weight's input, rescale the block by the method's searches, and let layers choose among their settings,
        before or behind that. `seen` takes what formats of inputs are chosen by."""
        stream, searches = self.stream, self.method.searches
        parameters = [p.parameter for p in planned]
        if searches or self.method.folds_shifts or self.method.needs & HEAD_STATISTICS:
            # An uncompressed weight may share an input that is rescaled, and must be divided too; or it may belong to the attention.
            parameters, _ = list_weights(stream.model, block.index, ())
        observed = stream.observe(parameters)
        if self.measured is not None:
            found = self.measured(block.index).to(stream.model.device)
        else:
            found = stream.capture_(block.index, observed, replaced, goes_on=goes_on, final=final)
        stats = found.stats
        if "sensitivity" in self.method.needs:
            stats = stats | self._sensitivities(planned, stats)
        if "output_gram" in self.method.needs:
            outputs = {name: stream.of_loss(output_gram_of(name)) for name in stats}
            stats = {name: replace(s, output_gram=outputs[name]) for name, s in stats.items()}
        chosen_by = {name: s.by_loss() for name, s in stats.items()}
        if (shift := self.method.only(Shift)) is not None:
            self.shifts = BlockShifts.choose(shift, stream.model, block.index, planned, observed, found)
            chosen_by = self.shifts.of_distances(chosen_by)
        middles = {} if self.shifts is None else self.shifts.middles
        settled = settle_layers(self.method, planned, chosen_by, block.tensors, "range")
        groups, apart = (found.groups, found.probe), settled.unscaled
        scales = rescale_block_(
            stream.model,
            block.index,
            block.tensors,
            settled.planned,
            observed,
            groups[0],
            chosen_by,
            searches,
            groups[1],
            apart,
        )
        if not settled.told:
            settled = settle_layers(self.method, planned, scales.stats, block.tensors, "output error")
        for p in planned if self.method.of("channels") or self.method.of("bias") else ():
            stem = p.parameter.stem
            factor, folded = scales.factors.get(stem), stem not in scales.unfolded
            channels = SeenChannels.of(stats[stem], middles.get(stem), factor, folded=folded) if stem in stats else None
            if channels is not None:
                seen[p.parameter.name] = channels
        return stats, scales, settled

    def _sensitivities(self, planned: Sequence[PlannedWeight], stats: Mapping[str, Stats]) -> dict[str, Stats]:
        found = {}
        for p in planned:
            sensitivity = self.stream.of_loss(p.parameter.name)
            assert sensitivity is not None
            matrices = p.parameter.matrices(sensitivity)
            for part, matrix in zip(p.parameter.parts(), matrices, strict=True):
                if part in stats:
                    found[part] = replace(stats[part], sensitivity=matrix)
        return found


def packed_weights(opened: Sequence[OpenBlock]) -> dict[str, CompressedWeight]:
    """Return the compressed weights of blocks, by the names of parameters."""
    return {name: p.weight for one in opened for name, p in one.made.parameters.items()}


def check_early(rows: Sequence[TunedSpan], *, strict: bool) -> None:
    """Raise NumericsError where learning ended early and that is an error."""
    if strict and (early := next((row for row in rows if row.failed is not None), None)) is not None:
        raise NumericsError(f"{early.name}: {early.tuning} ended early: {early.failed} (an error because of --strict).")


def _of_stored(name: str, stats: Stats, scales: Rescaled | None) -> Stats:
    """Return the statistics of the input that a compressed weight has: divided by its factors, unless its own map divides it."""
    if scales is None or name not in scales.factors or name in scales.unfolded:
        return stats.by_loss()
    found, held_out = scales.stats[name], stats.held_out
    if held_out is None:
        return found
    return replace(found, held_out=replace(held_out, x=held_out.x / scales.factors[name]))
