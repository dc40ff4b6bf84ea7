"""Press one block after another: measure its inputs, rescale, quantize, and pass on what the compressed block gives.

The only place where calibration, transforms and quantizers meet. Everything random is drawn before; the same inputs give the same
bytes.
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration import STATISTICS, Capture, Stats, Watched, find_roles, of_origin
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.finite import all_finite
from bitpress.formats import AnyFormat, CompressedWeight, Format, Lossless, Scale, chain
from bitpress.pipeline.composition import compress_matrix
from bitpress.pipeline.memory import release
from bitpress.pipeline.plan import PlannedWeight
from bitpress.pipeline.products import list_weights
from bitpress.pipeline.rescale import PROBE_LENGTH, Rescaled, check_kept, rescale_block_
from bitpress.pipeline.streaming import StreamedModel
from bitpress.quantizers.quantizer import Outcome, output_errors
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Recipe

__all__ = ["Measured", "PressedBlock", "Presser", "digest"]

# Statistics for which it must be known which weights make a block's attention.
HEAD_STATISTICS = frozenset(name for name, statistic in STATISTICS.items() if "heads" in statistic.shape)


@dataclass
class PressedBlock:
    """What one block became: tensors to store, and facts for the journal."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"weights": self.weights, "digests": self.digests, "rows": self.rows}

    @property
    def error(self) -> float:
        """Mean relative error of the block's weights."""
        return math.fsum(row["error"] for row in self.rows) / max(len(self.rows), 1)


@dataclass(frozen=True)
class Measured:
    """What calibration saw of one block.

    stats    by the name of a weight
    groups   the names of weights that share an input
    probe    a short input of the block, to find out with how it is wired
    """

    stats: dict[str, Stats]
    groups: list[list[str]]
    probe: Float[torch.Tensor, "1 length hidden"]


class Presser:
    """Holds the model, the recipe's parts, and the hidden states that feed the next block.

    `before_advance` is called each time before those are overwritten. `sensitivity` gives what `measure_sensitivity` found for a
    parameter. `measured` gives what an earlier pass over the uncompressed model saw of a block: no text is run then, and where the
    recipe needs no gram, one that is there serves only to say what its error is. `visit` is called with the number of every block
    while its compressed weights are loaded.
    """

    def __init__(
        self,
        model: StreamedModel,
        recipe: Recipe,
        planned: Sequence[PlannedWeight],
        *,
        strict: bool = False,
        check_stop: Callable[[], None] = lambda: None,
        before_advance: Callable[[], None] = lambda: None,
        sensitivity: Callable[[str], torch.Tensor] | None = None,
        measured: Callable[[int], Measured] | None = None,
        visit: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.recipe, self.planned, self.strict, self.check_stop = model, recipe, planned, strict, check_stop
        self.before_advance, self.sensitivity, self.measured, self.visit = before_advance, sensitivity, measured, visit
        self.quantizer = recipe.make_quantizer()
        self.searches = [search for _, search in recipe.make_searches()]
        self.changes = [change for _, change in recipe.make_changes()]
        self.targets = [target for _, target in recipe.make_targets()]
        self.corrections = [correction for _, correction in recipe.make_corrections()]
        self.needs = recipe.needs()
        self.follows_original = recipe.calibration.inputs == "original"
        self.hidden: torch.Tensor | None = None
        # The hidden states of the uncompressed model, where a method compares the two.
        self.beside: torch.Tensor | None = None
        self._streams: torch.Tensor | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """What the next block is fed, as `start_` takes it up again."""
        return self.hidden if self._streams is None else self._streams

    def start_(self, tokens: torch.Tensor | None, stored: torch.Tensor | None) -> None:
        """Embed the calibration tokens; take up stored hidden states where an earlier run left some."""
        if tokens is None:
            return
        batches = tokens.split(self.recipe.batch)
        if stored is None:
            stored = torch.cat([self.model.embed(batch) for batch in batches])
            if of_origin(self.needs, "original"):
                stored = torch.stack([stored, stored])
        else:
            for batch in {batch.shape[0]: batch for batch in batches}.values():
                self.model.embed(batch)  # the model learns again what it passes to its blocks for this shape
        if of_origin(self.needs, "original"):
            self._streams = stored
            self.hidden, self.beside = stored
        else:
            self.hidden = stored
        if self.searches or self.needs & HEAD_STATISTICS or self.recipe.calibration.sequential:
            self.model.embed(tokens[:1, :PROBE_LENGTH])

    def press_(self, i: int, *, last: bool) -> PressedBlock:
        """Compress block `i` and move the hidden states past it (not past the last one: nothing needs them)."""
        tensors = self.model.load_block_(i)
        planned = [p for p in self.planned if p.block == i]
        compressed = {p.parameter.name for p in planned}
        block = PressedBlock({})
        stages = self._stages(i, planned) if self.recipe.calibration.sequential and self.needs else [planned]
        replaced: dict[str, torch.Tensor] = {}
        for stage in stages:
            final = stage is stages[-1]
            measuring = self.needs or self.measured is not None
            stats, scales = self._measure(i, tensors, stage, replaced, last=last, final=final) if measuring else ({}, None)
            for p in stage:
                self.check_stop()
                started = time.perf_counter()
                w_hat = self._press_parameter(block, p, tensors[p.parameter.name], stats, scales)
                block.rows[-1]["seconds"] = round(time.perf_counter() - started, 3)
                if self.visit is not None or (self.needs and not (last and final)):
                    self.model.fill_({p.parameter.name: w_hat})
                replaced[p.parameter.name] = tensors[p.parameter.name]
        # Only now: searches rewrite the norms and biases that take their scales.
        kept = {name: t for name, t in tensors.items() if name not in compressed}
        if self.searches:
            check_kept(self.model, kept)
        block.tensors |= kept
        if not last and self.needs and not self.follows_original and self.measured is None:
            self._advance(i)
        if self.visit is not None:
            self.visit(i)
        self.model.drop_block_(i)
        release()
        return block

    def measure_(self, i: int, needs: Collection[str], *, last: bool) -> Measured:
        """Collect statistics of every weight of block `i` and move the hidden states past it, with nothing compressed."""
        self.model.load_block_(i)
        watched = self._watch(list_weights(self.model.block_name(i), self.model.blocks[i], self.model.model.config, ())[0])
        found = self._capture(i, watched, needs, {}, last=last, final=True)
        self.model.drop_block_(i)
        release()
        return found

    def _stages(self, i: int, planned: Sequence[PlannedWeight]) -> list[list[PlannedWeight]]:
        """Part a block's weights by their inputs, in the order in which these are made; experts together, by what they share."""
        watched = self._watch([p.parameter for p in planned])
        capture = Capture([w for _, w in watched.values()], ())
        _, hidden = self._batches()[0]
        capture.run(lambda: self.model.run_block(i, hidden[:1, :PROBE_LENGTH]), whole=True)

        def alike(name: str) -> str:
            return re.sub(r"\d+", "*", name) if watched[name][1].expert else name

        number: dict[str, int] = {}
        for at, group in enumerate(capture.groups()):
            known = min((number[alike(name)] for name in group if alike(name) in number), default=at)
            number |= {alike(name): known for name in group}
        stages: dict[int, list[PlannedWeight]] = {}
        for p in planned:
            # Experts that the probe did not reach go with their like; what it never uses goes last.
            stages.setdefault(number.get(alike(p.parameter.parts()[0]), len(number)), []).append(p)
        return [stages[at] for at in sorted(stages)]

    def _measure(
        self,
        i: int,
        tensors: dict[str, torch.Tensor],
        planned: Sequence[PlannedWeight],
        replaced: Mapping[str, torch.Tensor],
        *,
        last: bool,
        final: bool,
    ) -> tuple[dict[str, Stats], Rescaled]:
        """Collect statistics of every weight's input; let the recipe's searches rescale the block by them."""
        parameters = [p.parameter for p in planned]
        if self.searches or self.needs & HEAD_STATISTICS:
            # A weight that is kept may share an input that is rescaled, and has to follow; or have its part in the attention.
            parameters, _ = list_weights(self.model.block_name(i), self.model.blocks[i], self.model.model.config, ())
        watched = self._watch(parameters)
        if self.measured is not None:
            found = self.measured(i)
        else:
            found = self._capture(i, watched, self.needs, replaced, last=last, final=final)
        stats = found.stats
        if self.sensitivity is not None:
            stats = stats | self._sensitivities(planned, stats)
        scales = rescale_block_(self.model, i, tensors, planned, watched, found.groups, stats, self.searches, found.probe)
        return stats, scales

    def _watch(self, parameters: Sequence[WeightParameter]) -> dict[str, tuple[WeightParameter, Watched]]:
        watched: dict[str, tuple[WeightParameter, Watched]] = {}
        for parameter in parameters:
            live = self.model.model.get_parameter(parameter.name)
            for part, view in zip(parameter.parts(), parameter.views(live), strict=True):
                watched[part] = (parameter, Watched(part, view, not parameter.transposed, bool(parameter.experts)))
        return watched

    def _capture(
        self,
        i: int,
        watched: Mapping[str, tuple[WeightParameter, Watched]],
        needs: Collection[str],
        replaced: Mapping[str, torch.Tensor],
        *,
        last: bool,
        final: bool,
    ) -> Measured:
        """Run the calibration text through the loaded block.

        `replaced` holds what weights that are compressed already were, for the uncompressed model's forward, whose states move on only
        in the `final` of a block's passes.
        """
        batches = self._batches()
        probe = batches[0][1][:1, :PROBE_LENGTH].clone()
        roles = None
        if HEAD_STATISTICS & set(needs):
            roles = find_roles(lambda: self.model.run_block(i, probe), [w for _, w in watched.values()])
        capture = Capture([w for _, w in watched.values()], needs, roles)
        if (self.beside is not None and final) or self.follows_original:
            self.before_advance()  # the original's states are overwritten as soon as they have been used
        original = {name: value.to(self.model.dtype) for name, value in replaced.items()}
        pressed = {name: self.model.model.get_parameter(name).data for name in original}
        for rows, hidden in batches:
            if self.beside is not None:
                self.model.fill_(original)
                beside = self.beside[rows]
                out = capture.run(partial(self.model.run_block, i, beside), whole=final, original=True)
                self.model.fill_(pressed)
                if final and out is not None:
                    self.beside[rows] = self._checked(i, out)
            out = capture.run(partial(self.model.run_block, i, hidden), whole=self.follows_original and not last)
            if self.follows_original and not last and out is not None:
                hidden.copy_(self._checked(i, out))
            self.check_stop()
        return Measured(capture.finish(), capture.groups(), probe)

    def _sensitivities(self, planned: Sequence[PlannedWeight], stats: Mapping[str, Stats]) -> dict[str, Stats]:
        assert self.sensitivity is not None
        found = {}
        for p in planned:
            matrices = p.parameter.matrices(self.sensitivity(p.parameter.name))
            for part, matrix in zip(p.parameter.parts(), matrices, strict=True):
                if part in stats:
                    found[part] = replace(stats[part], sensitivity=matrix)
        return found

    def _advance(self, i: int) -> None:
        self.before_advance()
        for rows, hidden in self._batches():
            assert self.hidden is not None
            self.hidden[rows] = self._checked(i, self.model.run_block(i, hidden))
            self.check_stop()

    def _checked(self, i: int, out: torch.Tensor) -> torch.Tensor:
        if not all_finite(out):
            raise NumericsError(f"{self.model.block_name(i)}: the output of the block is not finite.")
        return out

    def _batches(self) -> list[tuple[slice, torch.Tensor]]:
        if self.hidden is None:
            raise CalibrationError("no calibration text was given, and this method needs statistics of the inputs.")
        size = self.recipe.batch
        starts = range(0, self.hidden.shape[0], size)
        return [(slice(a, a + size), self.hidden[a : a + size]) for a in starts]

    def _press_parameter(
        self,
        block: PressedBlock,
        planned: PlannedWeight,
        original: torch.Tensor,
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
    ) -> torch.Tensor:
        """Compress a parameter, all of its experts one by one; note it in `block`; give it back decoded."""
        parameter = planned.parameter
        outcomes, errors, tokens = [], [], []
        for name, w in zip(parameter.parts(), parameter.matrices(original), strict=True):
            outcome, error = self._press_matrix(name, parameter, w, stats.get(name), planned.format, scales)
            outcomes.append(outcome)
            errors.append(error)
            tokens.append(stats[name].tokens if name in stats else 0)
        weight = CompressedWeight.stack_rows([o.weight for o in outcomes]) if parameter.experts else outcomes[0].weight
        w_hat = weight.dequantize()
        if not all_finite(w_hat):
            raise NumericsError(f"{parameter.stem}: the compressed weight is not finite.")
        block.tensors |= {f"{parameter.stem}.{leaf}": t for leaf, t in weight.tensors().items()}
        record = {"spec": weight.spec(), "transposed": parameter.transposed, "experts": parameter.experts}
        if (by_terms := _errors_by_terms(outcomes, len(weight.terms))) is not None:
            record["errors"] = by_terms
        block.weights[parameter.name] = record
        block.digests[parameter.name] = digest(w_hat)
        block.rows.append(
            {
                **planned.row(),
                "bytes": weight.nbytes,
                "bits_per_weight": weight.bits_per_weight,
                "error_rounded": _mean([e[0] for e in errors]),
                "error": _mean([e[1] for e in errors]),
                "measured_on": "output" if "gram" in self.needs or self.measured is not None else "weight",
                "tokens": tokens if parameter.experts else tokens[0],
                "fallbacks": [text for o in outcomes for text in o.fallbacks],
            }
        )
        return parameter.restore(w_hat)

    def _press_matrix(
        self,
        name: str,
        parameter: WeightParameter,
        w: Float[torch.Tensor, "out in"],
        stats: Stats | None,
        fmt: AnyFormat,
        scales: Rescaled | None,
    ) -> tuple[Outcome, tuple[float, float]]:
        """Compress one matrix; errors are those of the layer's output, plainly rounded and as compressed.

        `w` has a rescaled weight's columns multiplied by their factor already; `stats` are of the input as it was.
        """
        if isinstance(fmt, Lossless):
            try:
                return Outcome(CompressedWeight((fmt.encode(w),))), (0.0, 0.0)
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from error
        factor = None if scales is None else scales.factors.get(name)
        scarce = self._scarce(name, parameter, stats)
        if scarce is not None:
            # Experts of one stack have the same kinds of terms: this one goes the same way, as if its channels were all alike.
            alike = Stats(1, torch.eye(w.shape[1]), torch.ones(w.shape[1]))
            quantizer = self.quantizer if self.quantizer.needs <= {"gram", "mean_abs"} else RTN(clip="mse")
            outcome = replace(compress_matrix(w, alike, fmt, quantizer, corrections=self.corrections), fallbacks=(scarce,))
        else:
            seen = stats if scales is None else scales.stats.get(name)
            outcome = self._compose(name, w, self._needed(seen), fmt)
        unscaled, w_hat = w, outcome.weight.dequantize()
        if factor is not None and scales is not None:
            unscaled, w_hat = w / factor, w_hat / factor
            if name in scales.unfolded:
                weight = outcome.weight
                divide = Scale((1 / factor).contiguous())
                mapped = CompressedWeight(weight.terms, chain(divide, weight.input_map), weight.output_map)
                text = "no producer takes the input's scale; it is applied at run time"
                outcome = replace(outcome, weight=mapped, fallbacks=(*outcome.fallbacks, text))
        if outcome.fallbacks and self.strict:
            raise NumericsError(f"{name}: {outcome.fallbacks[0]} (an error because of --strict).")
        alone = self.quantizer == RTN() and not self.changes and not self.corrections and not self.targets
        plain = w_hat if alone else RTN().quantize(unscaled, None, fmt).weight.dequantize()
        usable = None if scarce is not None else stats
        before, after = output_errors(unscaled, (plain, w_hat), usable)
        return outcome, (before, after)

    def _compose(self, name: str, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        try:
            return compress_matrix(w, stats, fmt, self.quantizer, self.changes, self.corrections, self.targets)
        except (CalibrationError, FormatError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _needed(self, stats: Stats | None) -> Stats | None:
        """Leave out what is there only to say what the error is."""
        if stats is None or not self.needs:
            return None
        return stats if "gram" in self.needs else replace(stats, gram=None)

    def _scarce(self, name: str, parameter: WeightParameter, stats: Stats | None) -> str | None:
        """Say why a weight cannot be compressed by its statistics, or None. Only experts may go without."""
        if not self.needs:
            return None
        tokens = stats.tokens if stats is not None else 0
        if parameter.experts and tokens < max(self.recipe.min_expert_tokens, 1):
            return f"{name} saw {tokens} calibration tokens, fewer than {self.recipe.min_expert_tokens}; rounded without statistics"
        if stats is None:
            raise CalibrationError(f"{name}: calibration never reached this layer; skip it with --skip or quantize with rtn.")
        if stats.gram is not None and float(stats.gram.diagonal().sum()) <= 0:
            raise CalibrationError(f"{name}: every calibration input of this layer was zero.")
        return None


def digest(w_hat: Float[torch.Tensor, "rows in"]) -> str:
    """SHA-256 of a decoded weight's float32 values, to be compared after the file has been read again."""
    return hashlib.sha256(w_hat.contiguous().numpy().data).hexdigest()


def _errors_by_terms(outcomes: Sequence[Outcome], count: int) -> list[float] | None:
    """Give the errors of the first 1, 2, ... of a weight's terms, experts' on average, where its quantizer says them all."""
    wanted = [f"error_{k}" for k in range(1, count + 1)]
    if not all(set(wanted) == {name for name in o.figures if name.startswith("error_")} for o in outcomes):
        return None
    return [_mean([o.figures[name] for o in outcomes]) for name in wanted]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
