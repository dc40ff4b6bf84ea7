"""Learn a compressed block further by gradients: what the recipe's `tuning` says, one after the other, before the block is committed."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.errors import NumericsError
from bitpress.formats import CompressedLayer, CompressedWeight, InputFormat, Packed
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.learned_inputs import begin_inputs
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import TunedSpan
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import Named
from bitpress.tuning.folded import FoldedVector
from bitpress.tuning.learned import Learned, LearnedVector, LearnedWeight, learned_term
from bitpress.tuning.learned_maps import MappedWeight, MapTuning
from bitpress.tuning.objectives import BlockObjective, LayerObjective
from bitpress.tuning.tuner import Tuning, begin_weight, tune_

__all__ = ["BlockTuner", "Tuned"]


@dataclass(frozen=True)
class Tuned:
    """What came out of learning a block: weights and vectors that changed, by the names of parameters, a row for each span, and notes on
    weights that could not be learned, by name.

    inputs    formats of inputs that changed
    folded    the factors of weights' entries, where channel factors were folded
    """

    weights: dict[str, CompressedWeight]
    vectors: dict[str, torch.Tensor]
    rows: list[TunedSpan]
    notes: dict[str, list[str]]
    inputs: dict[str, InputFormat]
    folded: dict[str, Float[torch.Tensor, "out in"]]


class BlockTuner:
    """Learns one block.

    originals   what the compressed weights stand for, [out, in], by the names of parameters
    stats       of the inputs that these have
    kept        the block's other tensors, as stored
    inputs      how inputs of products are rounded, by the names of parameters
    targets     what the block should give for the hidden states of the stream, held-out windows too; None where every span is a layer
    """

    def __init__(
        self,
        stream: CalibrationStream,
        block: int,
        planned: Sequence[PlannedWeight],
        originals: Mapping[str, Float[torch.Tensor, "out in"]],
        stats: Mapping[str, Stats],
        kept: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
        inputs: Mapping[str, InputFormat],
    ) -> None:
        self.stream, self.block, self.planned, self.originals = stream, block, planned, dict(originals)
        self.inputs, self.folded = dict(inputs), dict[str, torch.Tensor]()
        self.stats, self.kept, self.targets = stats, kept, targets
        self.name = stream.model.block_name(block)

    def tune(
        self,
        tunings: Sequence[Named[Tuning]],
        start: Mapping[str, CompressedWeight],
        note: Callable[[str, float, float], None] = lambda name, share, loss: None,
    ) -> Tuned:
        """Learn what `tunings` say, each from what the one before left. Raises NumericsError where the start has no finite loss.

        `note` hears of every step: the name of a block or weight, the share of all learning that is done, the loss.
        """
        made, vectors = dict(start), dict[str, torch.Tensor]()
        rows, notes = list[TunedSpan](), dict[str, list[str]]()
        for number, named in enumerate(tunings):
            tuning = named.part

            def heard(name: str, at: int, of: int) -> Callable[[float, float], None]:
                begun, width = (number + at / of) / len(tunings), 1 / of / len(tunings)  # noqa: B023 (called in this round)
                return lambda share, loss: note(name, begun + share * width, loss)

            weights: dict[str, LearnedWeight | MappedWeight | None] = {}
            folded: dict[str, FoldedVector] = {}
            if isinstance(tuning, MapTuning):
                weights, folded = self._mapped(tuning, named.name, made, vectors, notes)
            else:
                weights |= {p.parameter.name: self._learned(p, made, tuning, named.name, notes) for p in self.planned}
            open_weights = {name: one for name, one in weights.items() if one is not None}
            if tuning.span == "layer":
                for at, (name, one) in enumerate(open_weights.items()):
                    assert isinstance(one, LearnedWeight)
                    row = self._layer(named, name, one, heard(name, at, len(open_weights)))
                    rows.append(row)
                    if row.kept:
                        made[name] = one.harden()
                continue
            norms: dict[str, LearnedVector | FoldedVector] = {**self._vectors(tuning, vectors), **folded}
            if not open_weights and not norms:
                continue
            row = self._whole(named, {**open_weights, **norms}, made, vectors, heard(self.name, 0, 1))
            rows.append(row)
            if row.kept:
                made |= {name: one.harden() for name, one in open_weights.items()}
                vectors |= {name: one.harden() for name, one in norms.items()}
                self._keep_inputs_(open_weights)
        changed = {name: weight for name, weight in made.items() if weight is not start[name]}
        return Tuned(
            changed, vectors, rows, notes, {name: self.inputs[name] for name in self.inputs if name in changed}, self.folded
        )

    def _mapped(
        self,
        tuning: MapTuning,
        method: str,
        made: Mapping[str, CompressedWeight],
        vectors: Mapping[str, torch.Tensor],
        notes: dict[str, list[str]],
    ) -> tuple[dict[str, LearnedWeight | MappedWeight | None], dict[str, FoldedVector]]:
        """Return the weights whose inputs' maps are learned, and the vectors that take their factors. The loaded block is that of `made`."""
        self._fill_(made, vectors)
        found = begin_inputs(
            tuning, self.stream, self.block, self.planned, made, self.inputs, self.originals, {**self.kept, **vectors}
        )
        for name, why in found.notes.items():
            notes.setdefault(name, []).append(f"{method} {why}")
        return dict(found.weights), found.vectors

    def _keep_inputs_(self, learned: Mapping[str, LearnedWeight | MappedWeight]) -> None:
        """Take over how inputs are rounded now, and what weights stand for."""
        for name, one in learned.items():
            if isinstance(one, MappedWeight):
                rounded = one.harden_input()
                if rounded is not None:
                    self.inputs[name] = rounded
                with torch.no_grad():
                    self.originals[name] = one.codes.fold(one.codes.target)
                    before = self.folded.get(name)
                    self.folded[name] = one.codes.fold(torch.ones_like(one.codes.target) if before is None else before)

    def _learned(
        self, p: PlannedWeight, made: Mapping[str, CompressedWeight], tuning: Tuning, method: str, notes: dict[str, list[str]]
    ) -> LearnedWeight | None:
        """Return a weight as it is learned, None where its codes stay."""
        name, weight, experts = p.parameter.name, made[p.parameter.name], p.parameter.experts
        unseen = tuning.span == "layer" and p.parameter.stem not in self.stats
        if experts or weight.parts > 1 or unseen:
            why = "a layer that no token reached" if unseen and not experts else "experts"
            notes.setdefault(name, []).append(f"{method} learns no codes of {why}; they stay as they were")
            return None
        at = learned_term(weight)
        codes = None if at is None else weight.terms[at]
        if isinstance(codes, Packed) and not is_served(tuning.serves, codes.format):
            notes.setdefault(name, []).append(f"{method} cannot learn codes of {codes.format.name}; they stay as they were")
            return None
        transposed = p.parameter.transposed and tuning.span == "block"
        learned = begin_weight(tuning, weight, self.originals[name], transposed=transposed, input=self.inputs.get(name))
        if learned is None and at is None:
            notes.setdefault(name, []).append(f"{method} learns no codes of this weight; they stay as they were")
        return learned

    def _vectors(self, tuning: Tuning, vectors: Mapping[str, torch.Tensor]) -> dict[str, LearnedVector]:
        if not tuning.norms:
            return {}
        own = dict(self.stream.model.model.named_parameters())
        return {
            name: LearnedVector(vectors.get(name, stored), tuning.norms / tuning.learning_rate)
            for name, stored in self.kept.items()
            if name in own and stored.ndim == 1 and stored.is_floating_point()
        }

    def _layer(self, named: Named[Tuning], name: str, one: LearnedWeight, note: Callable[[float, float], None]) -> TunedSpan:
        stem = name.removesuffix(".weight")
        stats = self.stats[stem]
        objective = LayerObjective(
            name, self.originals[name], stats.need_gram(named.name), None if stats.held_out is None else stats.held_out.x
        )
        return self._run(named, stem, objective, {name: one}, stats.tokens, note)

    def _whole(
        self,
        named: Named[Tuning],
        learned: Mapping[str, LearnedWeight | MappedWeight | LearnedVector | FoldedVector],
        made: Mapping[str, CompressedWeight],
        vectors: Mapping[str, torch.Tensor],
        note: Callable[[float, float], None],
    ) -> TunedSpan:
        model, stream = self.stream.model, self.stream
        fixed = {name: weight for name, weight in made.items() if name not in learned}
        self._fill_(fixed, {name: v for name, v in vectors.items() if name not in learned})
        assert stream.hidden is not None
        counted, windows, batch = _counted(stream), len(stream.hidden), named.part.batch
        # Steps and looks at held-out text have batches of these sizes.
        for size in {min(batch, counted), min(batch, windows - counted), (windows - counted) % batch} - {0}:
            stream.embed_batch_(size)
        objective = BlockObjective(
            lambda hidden, values: model.run_block_with(self.block, hidden, values),
            stream.hidden,
            self.targets[named.part.targets],
            counted,
            named.part.loss,
            batch=batch,
            device=model.device,
            columns=model.value_columns,
        )
        tokens = objective.windows * stream.hidden.shape[1]
        return self._run(named, self.name, objective, learned, tokens, note)

    def _fill_(self, made: Mapping[str, CompressedWeight], vectors: Mapping[str, torch.Tensor]) -> None:
        """Let the loaded block compute with these weights and vectors."""
        model, shapes = self.stream.model, {p.parameter.name: p.parameter for p in self.planned}
        model.fill_({**{name: shapes[name].restore(weight.dequantize()) for name, weight in made.items()}, **vectors})
        model.set_products_({name: CompressedLayer(made[name], own) for name, own in self.inputs.items() if name in made})

    def _run(
        self,
        named: Named[Tuning],
        name: str,
        objective: BlockObjective | LayerObjective,
        learned: Mapping[str, Learned],
        tokens: int,
        note: Callable[[float, float], None],
    ) -> TunedSpan:
        started, steps = time.perf_counter(), named.part.steps
        curve = tune_(
            objective,
            learned,
            named.part,
            self.block,
            self.stream.check_stop,
            lambda step, loss: note(step / steps, loss),
        )
        if not math.isfinite(curve.before):
            raise NumericsError(f"{name}: the loss of what {named.name} starts from is {curve.before:g}.")
        return TunedSpan(
            name=name,
            tuning=named.name,
            span=named.part.span,
            steps=curve.steps,
            learned=sum(leaf.tensor.numel() for one in learned.values() for leaf in one.leaves()),
            tokens=tokens,
            before=curve.before,
            after=curve.after,
            kept=curve.better,
            calibration=list(curve.calibration),
            seconds=round(time.perf_counter() - started, 3),
            failed=curve.failed,
        )


def _counted(stream: CalibrationStream) -> int:
    """Return the windows that are learned from: those of calibration, or all but the last sixteenth where none beside them is held out."""
    assert stream.hidden is not None
    windows = len(stream.hidden)
    return stream.counted if stream.counted < windows else max(windows - max(windows // 16, 1), 1)
