"""Learn compressed blocks further by gradients: what the recipe's `tuning` says, one after the other, before they are committed."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.errors import NumericsError
from bitpress.formats import CompressedLayer, CompressedWeight, InputFormat, Packed
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.learned_inputs import begin_inputs
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import TunedSpan
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import Named
from bitpress.tuning.folded import FoldedVector
from bitpress.tuning.learned import Learned, LearnedVector, LearnedWeight, Value, learned_term
from bitpress.tuning.learned_maps import MappedWeight, MapTuning
from bitpress.tuning.objectives import BlockObjective, LayerObjective
from bitpress.tuning.stack import LearnedStack, begin_stack, parts_of
from bitpress.tuning.tuner import Objective, Tuning, begin_weight, tune_
from bitpress.tuning.wide_objectives import BlockRun, WindowObjective

__all__ = ["Held", "SpanTuner", "Targets", "Tuned", "begin_vectors", "begin_weights", "block_runs", "windows_counted"]

# By the name of a target, what is wanted behind blocks of the span, by their number in it.
Targets = Mapping[str, Mapping[int, torch.Tensor]]


@dataclass(frozen=True)
class Held:
    """What is held of a span while it is learned, by the names of parameters.

    originals   what the compressed weights stand for, [out, in], experts stacked
    stats       of the inputs that these have, by the names of single weights
    kept        the blocks' other tensors, as stored
    rounded     how inputs of products are rounded, by the names of parameters
    """

    planned: Sequence[PlannedWeight]
    originals: Mapping[str, Float[torch.Tensor, "rows in"]]
    stats: Mapping[str, Stats]
    kept: Mapping[str, torch.Tensor]
    rounded: Mapping[str, InputFormat]


@dataclass(frozen=True)
class Tuned:
    """What came out of learning a span: weights and vectors that changed, by the names of parameters, a row for each span, and notes on
    weights that could not be learned, by name.

    inputs    formats of inputs that changed
    folded    the factors of weights' entries, where channel factors were folded
    stats     of the inputs that the weights have now, by the names of single weights
    fallbacks what the recipe's quantizer fell back to in a learned basis
    """

    weights: dict[str, CompressedWeight]
    vectors: dict[str, torch.Tensor]
    rows: list[TunedSpan]
    notes: dict[str, list[str]]
    inputs: dict[str, InputFormat]
    folded: dict[str, Float[torch.Tensor, "out in"]]
    stats: dict[str, Stats]
    fallbacks: dict[str, list[str]]


class SpanTuner:
    """Learns a block, its layers one by one, or several blocks in a row.

    through   the blocks that run, of which the first `learned` hold what is learned
    inputs    hidden states before them, held-out windows too; `targets` what is wanted behind them, empty where every span is a layer
    """

    def __init__(
        self,
        stream: CalibrationStream,
        through: Sequence[int],
        held: Held,
        inputs: torch.Tensor | None,
        targets: Targets,
        learned: int = 1,
    ) -> None:
        self.stream, self.through, self.planned, self.originals = stream, through, held.planned, dict(held.originals)
        self.stats, self.kept, self.inputs, self.targets = dict(held.stats), held.kept, inputs, targets
        self.rounded, self.folded = dict(held.rounded), dict[str, torch.Tensor]()
        self.name = stream.model.block_name(through[0]) + (f"-{through[learned - 1]}" if learned > 1 else "")

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
        rows, notes, fallbacks = list[TunedSpan](), dict[str, list[str]](), dict[str, list[str]]()
        for number, named in enumerate(tunings):
            tuning = named.part

            def heard(name: str, at: int, of: int) -> Callable[[float, float], None]:
                begun, width = (number + at / of) / len(tunings), 1 / of / len(tunings)  # noqa: B023 (called in this round)
                return lambda share, loss: note(name, begun + share * width, loss)

            if tuning.span == "layer":
                rows += self._layers(named, made, heard, notes)
                continue
            open_weights: Mapping[str, LearnedWeight | LearnedStack | MappedWeight]
            norms: dict[str, LearnedVector | FoldedVector] = {**begin_vectors(tuning, self.stream.model, self.kept, vectors)}
            if isinstance(tuning, MapTuning):
                open_weights, folded = self._mapped(tuning, named.name, made, vectors, notes)
                norms |= folded
            else:
                open_weights = begin_weights(tuning, named.name, self.planned, made, self.originals, notes, self.rounded)
            if not open_weights and not norms:
                continue
            row = self._whole(named, {**open_weights, **norms}, made, vectors, heard(self.name, 0, 1))
            rows.append(row)
            if row.kept:
                made |= {name: one.harden() for name, one in open_weights.items()}
                vectors |= {name: one.harden() for name, one in norms.items()}
                self._keep_inputs_(open_weights)
                for name, one in open_weights.items():
                    if isinstance(one, MappedWeight):
                        notes.setdefault(name, []).extend([f"{named.name} {one.told}"] if one.told else [])
                        fallbacks.setdefault(name, []).extend(f"behind {named.name}: {text}" for text in one.fallbacks)
        changed = {name: weight for name, weight in made.items() if weight is not start[name]}
        rounded = {name: self.rounded[name] for name in self.rounded if name in changed}
        return Tuned(changed, vectors, rows, notes, rounded, self.folded, self.stats, fallbacks)

    def _mapped(
        self,
        tuning: MapTuning,
        method: str,
        made: Mapping[str, CompressedWeight],
        vectors: Mapping[str, torch.Tensor],
        notes: dict[str, list[str]],
    ) -> tuple[dict[str, LearnedWeight | LearnedStack | MappedWeight], dict[str, FoldedVector]]:
        """Return the weights whose inputs' maps are learned, and the vectors that take their factors. The loaded block is that of `made`."""
        self._fill_(made, vectors)
        (block,) = self.through
        found = begin_inputs(
            tuning, self.stream, block, self.planned, made, self.rounded, self.originals, {**self.kept, **vectors}, self.stats
        )
        for name, why in found.notes.items():
            notes.setdefault(name, []).append(f"{method} {why}")
        return dict(found.weights), found.vectors

    def _keep_inputs_(self, learned: Mapping[str, LearnedWeight | LearnedStack | MappedWeight]) -> None:
        """Take over how inputs are rounded now, what weights stand for, and the statistics of inputs whose factors were folded."""
        stems = {p.parameter.name: p.parameter.stem for p in self.planned}
        for name, one in learned.items():
            if isinstance(one, MappedWeight):
                columns, stem = one.shared.columns(), stems[name]
                if columns is not None and stem in self.stats:
                    self.stats[stem] = self.stats[stem].rescaled(1 / columns.detach())
                rounded = one.harden_input()
                if rounded is not None:
                    self.rounded[name] = rounded
                with torch.no_grad():
                    self.originals[name] = one.codes.fold(one.codes.target)
                    before = self.folded.get(name)
                    self.folded[name] = one.codes.fold(torch.ones_like(one.codes.target) if before is None else before)

    def _layers(
        self,
        named: Named[Tuning],
        made: dict[str, CompressedWeight],
        heard: Callable[[str, int, int], Callable[[float, float], None]],
        notes: dict[str, list[str]],
    ) -> list[TunedSpan]:
        """Learn every weight alone, experts one by one, and put what is better into `made`."""
        rows = []
        for at, p in enumerate(self.planned):
            parameter, weight = p.parameter, made[p.parameter.name]
            if (why := _refused(named.part, named.name, weight, parameter.experts)) is not None:
                notes.setdefault(parameter.name, []).append(why)
                continue
            count = max(parameter.experts, 1)
            parts = parts_of(weight, count) if parameter.experts else [weight]
            better, unseen = dict[int, CompressedWeight](), 0
            for e, (part, w) in enumerate(zip(parameter.parts(), self.originals[parameter.name].chunk(count), strict=True)):
                if not self._is_seen(part, alone=not parameter.experts):
                    unseen += 1
                    continue
                one = begin_weight(named.part, parts[e], w)
                if one is None:
                    if learned_term(parts[e]) is None:
                        text = f"{named.name} learns no codes of this weight; they stay as they were"
                        notes.setdefault(parameter.name, []).append(text)
                    continue
                row = self._layer(named, part, w, one, heard(part, at * count + e, len(self.planned) * count))
                rows.append(row)
                if row.kept:
                    better[e] = one.harden()
            if unseen:
                whose = f"{unseen} of {count} experts" if parameter.experts else "a layer"
                text = f"{named.name} learns no codes of {whose} that no token reached; they stay as they were"
                notes.setdefault(parameter.name, []).append(text)
            if better and (not named.part.adds_maps or len(better) == count):
                chosen = [better.get(e, part) for e, part in enumerate(parts)]
                made[parameter.name] = CompressedWeight.stack_rows(chosen) if parameter.experts else chosen[0]
        return rows

    def _is_seen(self, part: str, *, alone: bool) -> bool:
        """Whether calibration reached a weight, and of an expert held-out text too: few tokens reach one, and nothing else judges it."""
        stats = self.stats.get(part)
        return stats is not None and (alone or (stats.held_out is not None and len(stats.held_out.x) > 0))

    def _layer(
        self,
        named: Named[Tuning],
        part: str,
        w: Float[torch.Tensor, "out in"],
        one: LearnedWeight,
        note: Callable[[float, float], None],
    ) -> TunedSpan:
        stats = self.stats[part]
        held_out = None if stats.held_out is None else stats.held_out.x
        objective = LayerObjective(part, w, stats.need_gram(named.name), held_out)
        return self._run(named, part, objective, {part: one}, stats.tokens, note)

    def _whole(
        self,
        named: Named[Tuning],
        learned: Mapping[str, Learned],
        made: Mapping[str, CompressedWeight],
        vectors: Mapping[str, torch.Tensor],
        note: Callable[[float, float], None],
    ) -> TunedSpan:
        model, stream = self.stream.model, self.stream
        fixed = {name: weight for name, weight in made.items() if name not in learned}
        self._fill_(fixed, {name: v for name, v in vectors.items() if name not in learned})
        inputs = self.inputs
        assert inputs is not None
        counted, windows, batch = _counted(stream), len(inputs), named.part.batch
        # Steps and looks at held-out text have batches of these sizes.
        for size in {min(batch, counted), min(batch, windows - counted), (windows - counted) % batch} - {0}:
            stream.embed_batch_(size)
        targets, columns = self.targets[named.part.targets], model.value_columns
        tokens = counted * inputs.shape[1]
        if len(self.through) == 1:
            (block,) = self.through
            run, wanted = partial(model.run_block_with, block), targets[0]
            alone = BlockObjective(
                run, inputs, wanted, counted, named.part.loss, batch=batch, device=model.device, columns=columns
            )
            return self._run(named, self.name, alone, learned, tokens, note)
        runs = block_runs(model, self.through, learned)
        wide = WindowObjective(
            runs, inputs, targets, counted, named.part.loss, batch=batch, device=model.device, columns=columns
        )
        return self._run(named, self.name, wide, learned, tokens, note)

    def _fill_(self, made: Mapping[str, CompressedWeight], vectors: Mapping[str, torch.Tensor]) -> None:
        """Let the loaded block compute with these weights and vectors."""
        model, shapes = self.stream.model, {p.parameter.name: p.parameter for p in self.planned}
        model.fill_({**{name: shapes[name].restore(weight.dequantize()) for name, weight in made.items()}, **vectors})
        model.set_products_({name: CompressedLayer(made[name], own) for name, own in self.rounded.items() if name in made})

    def _run(
        self,
        named: Named[Tuning],
        name: str,
        objective: Objective,
        learned: Mapping[str, Learned],
        tokens: int,
        note: Callable[[float, float], None],
    ) -> TunedSpan:
        started, steps = time.perf_counter(), named.part.steps
        curve = tune_(
            objective,
            learned,
            named.part,
            self.through[0],
            self.stream.check_stop,
            lambda step, loss: note(step / steps, loss),
            lazily=len(self.through) > 1,
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


def begin_weights(
    tuning: Tuning,
    method: str,
    planned: Sequence[PlannedWeight],
    made: Mapping[str, CompressedWeight],
    originals: Mapping[str, Float[torch.Tensor, "rows in"]],
    notes: dict[str, list[str]],
    rounded: Mapping[str, InputFormat] | None = None,
) -> dict[str, LearnedWeight | LearnedStack]:
    """Return the weights of a span as they are learned, by the names of parameters, and note why others stay. `rounded` says how their
    inputs are rounded."""
    found = dict[str, LearnedWeight | LearnedStack]()
    for p in planned:
        parameter, weight = p.parameter, made[p.parameter.name]
        if (why := _refused(tuning, method, weight, parameter.experts)) is not None:
            notes.setdefault(parameter.name, []).append(why)
            continue
        original = originals[parameter.name]
        one: LearnedWeight | LearnedStack | None
        if parameter.experts:
            one = begin_stack(tuning, weight, original, parameter.experts, parameter.restore)
        else:
            own = (rounded or {}).get(parameter.name)
            one = begin_weight(tuning, weight, original, transposed=parameter.transposed, input=own)
        if one is not None:
            found[parameter.name] = one
        elif parameter.experts or learned_term(weight) is None:
            notes.setdefault(parameter.name, []).append(f"{method} learns no codes of this weight; they stay as they were")
    return found


def _refused(tuning: Tuning, method: str, weight: CompressedWeight, experts: int) -> str | None:
    """Say why the codes of a weight are not learned; None where they are, or where it has none."""
    first = parts_of(weight, experts)[0] if experts else weight
    at = learned_term(first)
    codes = None if at is None else first.terms[at]
    if isinstance(codes, Packed) and not is_served(tuning.serves, codes.format):
        return f"{method} cannot learn codes of {codes.format.name}; they stay as they were"
    return None


def begin_vectors(
    tuning: Tuning, model: StreamedModel, kept: Mapping[str, torch.Tensor], vectors: Mapping[str, torch.Tensor]
) -> dict[str, LearnedVector]:
    """Return the norms and biases among kept tensors as they are learned, from what an earlier tuning left in `vectors`."""
    if not tuning.norms:
        return {}
    own = dict(model.model.named_parameters())
    return {
        name: LearnedVector(vectors.get(name, stored), tuning.norms / tuning.learning_rate)
        for name, stored in kept.items()
        if name in own and stored.ndim == 1 and stored.is_floating_point()
    }


def block_runs(model: StreamedModel, through: Sequence[int], learned: Mapping[str, Learned]) -> list[BlockRun]:
    """Return the forwards of loaded blocks, each of which reads the learned parameters of its own block alone."""

    def run(block: int, names: Sequence[str], hidden: torch.Tensor, values: Mapping[str, Value]) -> torch.Tensor:
        return model.run_block_with(block, hidden, {name: values[name] for name in names})

    own = {i: [name for name in learned if name.startswith(f"{model.block_name(i)}.")] for i in through}
    return [partial(run, i, own[i]) for i in through]


def _counted(stream: CalibrationStream) -> int:
    assert stream.hidden is not None
    return windows_counted(stream.counted, len(stream.hidden))


def windows_counted(counted: int, windows: int) -> int:
    """Return the windows that are learned from: those of calibration, or all but the last sixteenth where none beside them is held out."""
    return counted if counted < windows else max(windows - max(windows // 16, 1), 1)
