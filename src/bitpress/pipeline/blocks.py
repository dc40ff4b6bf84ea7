"""Press one block after another: measure its inputs, rescale, quantize, and pass on what the compressed block gives.

The only place where calibration, searches over a block and the compression of weights (press_weight.py) meet. Everything random is
drawn before; the same inputs give the same bytes.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float

from bitpress.calibration import STATISTICS, Capture, Observed, Stats, find_roles, of_origin
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, NumericsError
from bitpress.finite import all_finite
from bitpress.memory import release
from bitpress.models.linears import list_weights
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.channel_scaling import PROBE_LENGTH, Rescaled, check_kept, rescale_block_
from bitpress.pipeline.plan import PlannedWeight
from bitpress.pipeline.weights import PressedBlock, WeightPresser
from bitpress.recipes import Recipe

__all__ = ["Measured", "Presser"]

# Statistics for which it must be known which weights make a block's attention.
HEAD_STATISTICS = frozenset(name for name, statistic in STATISTICS.items() if "heads" in statistic.shape)


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
        self.model, self.recipe, self.planned, self.check_stop = model, recipe, planned, check_stop
        self.before_advance, self.sensitivity, self.measured, self.visit = before_advance, sensitivity, measured, visit
        self.weights = WeightPresser(recipe, strict=strict)
        self.searches = [search for _, search in recipe.make_searches()]
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
                w_hat = self.weights.press_into(block, p, tensors[p.parameter.name], stats, scales)
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
        observed = self._watch(list_weights(self.model, i, ())[0])
        found = self._capture(i, observed, needs, {}, last=last, final=True)
        self.model.drop_block_(i)
        release()
        return found

    def _stages(self, i: int, planned: Sequence[PlannedWeight]) -> list[list[PlannedWeight]]:
        """Part a block's weights by their inputs, in the order in which these are made; experts together, by what they share."""
        observed = self._watch([p.parameter for p in planned])
        capture = Capture([w for _, w in observed.values()], ())
        _, hidden = self._batches()[0]
        capture.run(lambda: self.model.run_block(i, hidden[:1, :PROBE_LENGTH]), whole=True)

        def alike(name: str) -> str:
            return re.sub(r"\d+", "*", name) if observed[name][1].expert else name

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
            parameters, _ = list_weights(self.model, i, ())
        observed = self._watch(parameters)
        if self.measured is not None:
            found = self.measured(i)
        else:
            found = self._capture(i, observed, self.needs, replaced, last=last, final=final)
        stats = found.stats
        if self.sensitivity is not None:
            stats = stats | self._sensitivities(planned, stats)
        scales = rescale_block_(self.model, i, tensors, planned, observed, found.groups, stats, self.searches, found.probe)
        return stats, scales

    def _watch(self, parameters: Sequence[WeightParameter]) -> dict[str, tuple[WeightParameter, Observed]]:
        observed: dict[str, tuple[WeightParameter, Observed]] = {}
        for parameter in parameters:
            live = self.model.model.get_parameter(parameter.name)
            for part, view in zip(parameter.parts(), parameter.views(live), strict=True):
                observed[part] = (parameter, Observed(part, view, not parameter.transposed, bool(parameter.experts)))
        return observed

    def _capture(
        self,
        i: int,
        observed: Mapping[str, tuple[WeightParameter, Observed]],
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
            roles = find_roles(lambda: self.model.run_block(i, probe), [w for _, w in observed.values()])
        capture = Capture([w for _, w in observed.values()], needs, roles)
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
