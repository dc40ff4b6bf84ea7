"""Compress one block after another: measure its inputs, scale channels, quantize, and pass on the outputs of the compressed block.

This is the only place where calibration, searches over a block and the compression of weights meet. Everything random is drawn before,
so the same inputs give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bitpress.calibration import Stats
from bitpress.corrections.bias import BiasCorrection
from bitpress.errors import NumericsError
from bitpress.models.linears import list_weights
from bitpress.models.walk import LoadedBlock
from bitpress.pipeline.biases import correct_biases_
from bitpress.pipeline.calibration_stream import HEAD_STATISTICS, CalibrationStream, Measured, output_gram_of
from bitpress.pipeline.channel_scaling import Rescaled, check_kept, rescale_block_
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.rounded_inputs import SeenChannels, choose_operands
from bitpress.pipeline.shifting import BlockShifts
from bitpress.pipeline.tuning import BlockTuner
from bitpress.pipeline.weights import CompressedBlock, WeightCompressor
from bitpress.progress import Progress, Stepwise
from bitpress.recipes import Method
from bitpress.transforms.shift import Shift

__all__ = ["BlockCompressor"]


class BlockCompressor:
    """A visitor that compresses the weights of every block by a method; `made` is the block in work.

    stream       the calibration text, started already, with what `measure_gradients` found
    measured     returns the statistics of a block from an earlier pass over the uncompressed model: then no text is run, and if the
                 method needs no gram, a gram among them is used only to measure errors
    looked_at    whether later visitors run the block, so that its compressed weights must be loaded
    progress     hears of the steps of learning
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

    def visit_(self, block: LoadedBlock) -> None:
        """Compress a block into `made`, and move the calibration text past it (not past the last block where nothing needs its outputs)."""
        stream, model, tensors = self.stream, self.stream.model, block.tensors
        needs, follows = self.method.needs, self.method.follows_text
        planned = [p for p in self.planned if p.block == block.index]
        compressed = {p.parameter.name for p in planned}
        self.made, self.shifts = CompressedBlock(), None
        made = self.made
        sequential = self.method.recipe.calibration.sequential and needs
        # A block without weights to compress has one stage too, in which the uncompressed model's states move on.
        stages = (stream.stages(block.index, planned) if sequential else []) or [planned]
        advances = stream.goes_on(block) and follows and not stream.follows_original and self.measured is None
        foreseen = self.method.observes and stream.follows_original and stream.goes_on(block) and self.measured is None
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
            stats, scales = (
                self._measure(block, stage, replaced, seen, goes_on=goes_on, final=final) if measuring else ({}, None)
            )
            measured |= stats if self.method.tunings else {}
            targets = self._targets(block, planned, replaced, scales) if final and planned and self.method.tunings else {}
            for p in stage:
                stream.check_stop()
                name = p.parameter.name
                result, decoded = self.weights.compress(p, tensors[name], stats, scales)
                made.put_(result)
                if self.looked_at or self.method.observes or (follows and (stream.goes_on(block) or not final)):
                    model.fill_({name: decoded})
                replaced[name] = tensors[name]
            self._round_(block, stage, seen, runs=advances or self.looked_at or not final)
        if self.method.tunings and planned:
            self._tune_(block, planned, measured, scales, targets)
        if self.shifts is not None and planned:
            layers = {name: made.parameters[name].layer for name in self.shifts.fold_(model, planned, tensors, made, seen)}
            if advances or self.looked_at:
                model.set_products_(layers)
        # Only now, since searches and shifts rewrite the norms and biases that absorb them.
        made.kept = {name: t for name, t in tensors.items() if name not in compressed}
        if self.method.searches:
            check_kept(model, made.kept)
        if (bias := self.method.only(BiasCorrection)) is not None:
            correct_biases_(stream.model, bias, planned, tensors, made, seen)
        if foreseen:
            stream.take_foreseen_()
        elif advances:
            stream.advance_(block.index)

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
    ) -> dict[str, torch.Tensor]:
        """Return what the block should give: as the uncompressed model does there, and for the compressed blocks' states before it."""
        stream, wanted = self.stream, {named.part.targets for named in self.method.tunings if named.part.span == "block"}
        found = {}
        if "original" in wanted:
            assert stream.beside is not None
            found["original"] = stream.beside
        if "same" in wanted:
            plain = dict(replaced)
            for p in planned:  # nothing divides the input of these in the loaded block
                if scales is not None and p.parameter.stem in scales.unfolded:
                    name = p.parameter.name
                    plain[name] = p.parameter.restore(self.weights.unscaled(p, block.tensors[name], scales))
            now = {name: stream.model.model.get_parameter(name).data for name in plain}
            stream.model.fill_(plain)
            found["same"] = stream.run_all(block.index)
            stream.model.fill_(now)
        return found

    def _tune_(
        self,
        block: LoadedBlock,
        planned: Sequence[PlannedWeight],
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
        targets: Mapping[str, torch.Tensor],
    ) -> None:
        """Learn the compressed weights of the block further, and the norms that the recipe says; put the results into `made` and the model."""
        made, model, tensors = self.made, self.stream.model, block.tensors
        packed = {name: p.weight for name, p in made.parameters.items()}
        kept = {name: t for name, t in tensors.items() if name not in packed}
        open_ones = [p for p in planned if p.parameter.name in packed]
        originals = {p.parameter.name: self.weights.unscaled(p, tensors[p.parameter.name], scales) for p in open_ones}
        inputs = {name: _of_stored(name, found, scales) for name, found in stats.items()}
        tuner = BlockTuner(self.stream, block.index, open_ones, originals, inputs, kept, targets)
        progress = self.progress if isinstance(self.progress, Stepwise) else None
        tuned = tuner.tune(
            self.method.tunings,
            packed,
            lambda name, share, loss: None if progress is None else progress.step(name, share, loss=loss),
        )
        for p in open_ones:
            name = p.parameter.name
            if name in tuned.weights:
                result = self.weights.replaced(made.parameters[name], tuned.weights[name], tensors[name], stats, scales)
                made.put_(result)
            for text in tuned.notes.get(name, ()):
                made.put_(made.parameters[name].with_note(text))
        made.tuned = tuned.rows
        if self.weights.strict and (early := next((row for row in tuned.rows if row.failed is not None), None)) is not None:
            raise NumericsError(f"{early.name}: {early.tuning} ended early: {early.failed} (an error because of --strict).")
        tensors.update(tuned.vectors)
        decoded = {
            p.parameter.name: p.parameter.restore(made.parameters[p.parameter.name].weight.dequantize()) for p in open_ones
        }
        model.fill_({**decoded, **{name: tensors[name] for name in kept}})

    def _measure(
        self,
        block: LoadedBlock,
        planned: Sequence[PlannedWeight],
        replaced: Mapping[str, torch.Tensor],
        seen: dict[str, SeenChannels],
        *,
        goes_on: bool,
        final: bool,
    ) -> tuple[dict[str, Stats], Rescaled]:
        """Collect statistics of every weight's input, and rescale the block by the method's searches. `seen` takes what formats of inputs
        are chosen by."""
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
        scales = rescale_block_(
            stream.model, block.index, block.tensors, planned, observed, found.groups, chosen_by, searches, found.probe
        )
        for p in planned if self.method.of("channels") or self.method.of("bias") else ():
            stem = p.parameter.stem
            factor, folded = scales.factors.get(stem), stem not in scales.unfolded
            channels = SeenChannels.of(stats[stem], middles.get(stem), factor, folded=folded) if stem in stats else None
            if channels is not None:
                seen[p.parameter.name] = channels
        return stats, scales

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


def _of_stored(name: str, stats: Stats, scales: Rescaled | None) -> Stats:
    """Return the statistics of the input that a compressed weight has: divided by its factors, unless its own map divides it."""
    if scales is None or name not in scales.factors or name in scales.unfolded:
        return stats.by_loss()
    found, held_out = scales.stats[name], stats.held_out
    if held_out is None:
        return found
    return replace(found, held_out=replace(held_out, x=held_out.x / scales.factors[name]))
