"""The calibration text inside a model: the hidden states that feed the next block, and the passes that collect statistics there."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float

from bitpress.calibration import STATISTICS, Capture, Observed, Stats, find_roles, of_origin
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, NumericsError
from bitpress.finite import all_finite
from bitpress.models.linears import list_weights
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.models.walk import LoadedBlock
from bitpress.pipeline.channel_scaling import PROBE_LENGTH
from bitpress.pipeline.planned_weight import PlannedWeight

__all__ = [
    "HEAD_STATISTICS",
    "CalibrationStream",
    "Measured",
    "StatisticsVisitor",
    "observe_weights",
    "output_gram_of",
    "token_weights",
]

# Statistics for which it must be known which weights make a block's attention.
HEAD_STATISTICS = frozenset(name for name, statistic in STATISTICS.items() if "heads" in statistic.shape)


@dataclass(frozen=True)
class Measured:
    """What calibration saw of one block; the probe is on the host.

    stats    by the name of a weight
    groups   the names of weights that share an input
    probe    a short input of the block, to find out with how it is wired
    """

    stats: dict[str, Stats]
    groups: list[list[str]]
    probe: Float[torch.Tensor, "1 positions hidden"]

    def to(self, device: torch.device) -> "Measured":
        """Return the same with the statistics on a device; weights that share an input still share theirs."""
        moved = {id(stats): stats.to(device) for stats in self.stats.values()}
        return replace(self, stats={name: moved[id(stats)] for name, stats in self.stats.items()})


class CalibrationStream:
    """The hidden states of the calibration samples before the block in work, and beside them those of the uncompressed model where a
    method compares the two. They stay on the host; the model moves one batch at a time to its device, where statistics are summed up.

    needs             statistics that are collected of a block
    follows_original  blocks are fed what the uncompressed blocks before them give
    feeds_head        the last block's outputs are needed too, by `capture_head`
    gradients         what `measure_gradients` found, for statistics in which tokens count by the loss
    keeps_original    the uncompressed model's states are carried beside, even if no statistic compares the two
    before_advance    called each time before hidden states are overwritten
    """

    def __init__(
        self,
        model: StreamedModel,
        needs: Collection[str],
        *,
        batch: int,
        follows_original: bool,
        feeds_head: bool = False,
        gradients: Mapping[str, torch.Tensor] | None = None,
        check_stop: Callable[[], None] = lambda: None,
        before_advance: Callable[[], None] = lambda: None,
        keeps_original: bool = False,
    ) -> None:
        self.keeps_original = keeps_original or bool(of_origin(needs, "original"))
        self.model, self.needs, self.batch, self.follows_original = model, frozenset(needs), batch, follows_original
        self.feeds_head = feeds_head
        self.gradients, self.check_stop, self.before_advance = gradients or {}, check_stop, before_advance
        self.hidden: torch.Tensor | None = None
        self.beside: torch.Tensor | None = None
        self._streams: torch.Tensor | None = None
        self._foreseen: torch.Tensor | None = None
        self._inputs: Inputs | None = None
        self._counted = 0
        self._probe_positions = PROBE_LENGTH
        self._embedded: set[int] = set()

    @property
    def state(self) -> torch.Tensor | None:
        """What the next block is fed, as `start_` takes it up again."""
        return self.hidden if self._streams is None else self._streams

    def start_(
        self,
        inputs: Inputs | None,
        stored: torch.Tensor | None,
        fill_table_: Callable[[], None] = lambda: None,
        held_out: Inputs | None = None,
    ) -> None:
        """Embed the calibration inputs, or take up hidden states that an earlier run stored.

        `fill_table_` puts compressed embeddings into the model: what follows the original is embedded before it is called. Inputs that are
        `held_out` go through the blocks beside the others and count in no statistic.
        """
        if inputs is None:
            return
        both = self.keeps_original
        self._counted = len(inputs)
        if stored is not None and stored.shape[-3] == len(inputs):
            held_out = None  # stored by a version that held out nothing
        self._inputs = inputs if held_out is None else torch.cat([inputs, held_out])
        batches = [self._inputs[rows] for rows in self._rows(len(self._inputs))]
        if stored is None:
            beside = torch.cat([self.model.embed(batch) for batch in batches]) if both or self.follows_original else None
            fill_table_()
            stored = beside if self.follows_original else torch.cat([self.model.embed(batch) for batch in batches])
            assert stored is not None
            if beside is not None and both:
                stored = torch.stack([stored, beside])
        else:
            for batch in {batch.shape[0]: batch for batch in batches}.values():
                self.model.embed(batch)  # the model learns again what it passes to its blocks for this shape
        if both:
            self._streams = stored
            self.hidden, self.beside = stored
        else:
            self.hidden = stored
        self.embed_probe_(inputs)

    def embed_probe_(self, inputs: Inputs) -> None:
        """Let the model learn what it passes to its blocks for inputs as short as the probe."""
        self._probe_positions = self.model.embed(self.model.task.shorten(inputs[:1], PROBE_LENGTH)).shape[1]

    def probe(self) -> torch.Tensor:
        """Return a short input of the block."""
        return self.batches()[0][1][:1, : self._probe_positions]

    def stages(self, i: int, planned: Sequence[PlannedWeight]) -> list[list[PlannedWeight]]:
        """Part a block's weights by their inputs, in the order in which these are made; experts together, by what they share."""
        observed = self.observe([p.parameter for p in planned])
        capture = Capture([w for _, w in observed.values()], ())
        probe = self.probe()
        capture.run(lambda: self.model.run_block(i, probe), whole=True)

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

    def observe(self, parameters: Sequence[WeightParameter]) -> dict[str, tuple[WeightParameter, Observed]]:
        return observe_weights(self.model, parameters)

    def capture_(
        self,
        i: int,
        observed: Mapping[str, tuple[WeightParameter, Observed]],
        replaced: Mapping[str, torch.Tensor],
        *,
        goes_on: bool,
        final: bool,
    ) -> Measured:
        """Run the calibration text through the loaded block.

        `replaced` holds what weights that are compressed already were, for the uncompressed model's forward, whose states move on only
        in the `final` of a block's passes.
        """
        batches = self.batches()
        probe = self.probe().clone()
        roles = None
        if HEAD_STATISTICS & self.needs:
            roles = find_roles(lambda: self.model.run_block(i, probe), [w for _, w in observed.values()])
        counted = slice(0)
        weights: dict[str, torch.Tensor | None] = {}

        def loss_weights(name: str) -> torch.Tensor | None:
            """Return the weights of the tokens of the batch in work; those of all are read once a block."""
            if name not in weights:
                weights[name] = self.of_loss(token_weights(name))
            found = weights[name]
            return None if found is None else found[counted].flatten()

        capture = Capture([w for _, w in observed.values()], self.needs, roles, loss_weights)
        if (self.beside is not None and final) or self.follows_original:
            self.before_advance()  # the original's states are overwritten as soon as they have been used
        original = {name: value.to(self.model.dtype) for name, value in replaced.items()}
        compressed = {name: self.model.model.get_parameter(name).data for name in original}
        for rows, hidden in batches:
            counted = rows
            held_out = (hidden.shape[0], hidden.shape[1]) if rows.start >= self._counted else None
            if self.beside is not None and (final or held_out is None):
                self.model.fill_(original)
                beside = self.beside[rows]
                run = partial(self.model.run_block, i, beside)
                with self.model.unrounded(i):  # of held-out texts nothing is recorded
                    out = run() if held_out is not None else capture.run(run, whole=final, original=True)
                self.model.fill_(compressed)
                if final and out is not None:
                    self.beside[rows] = self._checked(i, out)
            whole = self.follows_original and goes_on
            out = capture.run(partial(self.model.run_block, i, hidden), whole=whole, held_out=held_out)
            if self.follows_original and goes_on and out is not None:
                hidden.copy_(self._checked(i, out))
            self.check_stop()
        return Measured(capture.finish(), capture.groups(), probe)

    def shared_inputs(self, i: int, observed: Mapping[str, tuple[WeightParameter, Observed]]) -> list[list[str]]:
        """Return the names of weights of a loaded block that share an input, group by group."""
        capture = Capture([w for _, w in observed.values()], ())
        with self.model.unrounded(i):
            capture.run(lambda: self.model.run_block(i, self.probe()), whole=True)
        return capture.groups()

    def embed_batch_(self, samples: int) -> None:
        """Let the model learn what it passes to its blocks for so many samples of calibration at a time."""
        if self._inputs is not None and samples not in self._embedded:
            self.model.embed(self._inputs[:samples])
            self._embedded.add(samples)

    def run_all(self, i: int, states: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the loaded block makes of the hidden states, the held-out ones too, or of other `states` of the same text."""
        found = []
        for rows, hidden in self.batches():
            found.append(self._checked(i, self.model.run_block(i, hidden if states is None else states[rows])))
            self.check_stop()
        return torch.cat(found)

    @property
    def counted(self) -> int:
        """The number of windows that count; those after them are held out."""
        return self._counted

    def of_loss(self, key: str) -> torch.Tensor | None:
        """Return what `measure_gradients` found under a key, on the device."""
        found = self.gradients.get(key)
        return None if found is None else found.to(self.model.device)

    def goes_on(self, block: LoadedBlock) -> bool:
        """Return whether a block's outputs are needed."""
        return not block.last or self.feeds_head

    def capture_head(self, parameter: WeightParameter, needs: Collection[str]) -> Stats | None:
        """Return the statistics of the output head's input, once the text is behind the last block; None where the head was never used."""
        if not needs:
            return None
        assert self._inputs is not None
        live = self.model.model.get_parameter(parameter.name)
        capture = Capture([Observed(parameter.stem, live, not parameter.transposed, False)], needs)
        assert self.hidden is not None
        # One sample at a time: the first of them is run to its outputs, which for a language model are large.
        for at, (sample, hidden) in enumerate(zip(self._inputs.split(1), self.hidden.split(1), strict=True)):
            held_out = (1, hidden.shape[1]) if at >= self._counted else None
            capture.run(partial(self.model.outputs, sample, hidden), whole=False, held_out=held_out)
            self.check_stop()
        return capture.finish().get(parameter.stem)

    def look_at_head(self, parameter: WeightParameter, see: Callable[[torch.Tensor], None]) -> None:
        """Show the inputs of the output head, once the text is behind the last block, for the samples that count."""
        assert self._inputs is not None
        assert self.hidden is not None
        module = self.model.model.get_submodule(parameter.name.rpartition(".")[0])
        hook = module.register_forward_pre_hook(lambda _, args: see(args[0]))
        try:
            for sample, hidden in zip(self._inputs[: self._counted].split(1), self.hidden.split(1), strict=False):
                self.model.outputs(sample, hidden)
                self.check_stop()
        finally:
            hook.remove()

    def look_(self, i: int) -> None:
        """Run the samples that count through a block, whose outputs are not kept."""
        for rows, hidden in self.batches():
            if rows.start < self._counted:
                self._checked(i, self.model.run_block(i, hidden))
                self.check_stop()

    def foresee_(self, i: int) -> None:
        """Run the text through a block that is not compressed yet, and keep its outputs beside the inputs until `take_foreseen_`."""
        self._foreseen = torch.cat([self._checked(i, self.model.run_block(i, hidden)) for _, hidden in self.batches()])
        self.check_stop()

    def take_foreseen_(self) -> None:
        """Go on with the outputs that `foresee_` kept."""
        assert self._foreseen is not None
        self.before_advance()
        self.hidden, self._foreseen = self._foreseen, None

    def return_to_(self, hidden: torch.Tensor | None, beside: torch.Tensor | None) -> None:
        """Take up hidden states from before again, and the original's beside them; those that are None stay as they are."""
        self.before_advance()
        for now, before in ((self.hidden, hidden), (self.beside, beside)):
            if now is not None and before is not None:
                now.copy_(before)

    def advance_(self, i: int) -> None:
        self.before_advance()
        for rows, hidden in self.batches():
            assert self.hidden is not None
            self.hidden[rows] = self._checked(i, self.model.run_block(i, hidden))
            self.check_stop()

    def _checked(self, i: int, out: torch.Tensor) -> torch.Tensor:
        if not all_finite(out):
            raise NumericsError(f"{self.model.block_name(i)}: the output of the block is not finite.")
        return out

    def batches(self) -> list[tuple[slice, torch.Tensor]]:
        if self.hidden is None:
            raise CalibrationError("no calibration text was given, and this method needs statistics of the inputs.")
        return [(rows, self.hidden[rows]) for rows in self._rows(self.hidden.shape[0])]

    def _rows(self, total: int) -> list[slice]:
        """Return the rows of every batch; those that are held out have batches of their own."""
        starts = [*range(0, self._counted, self.batch), *range(self._counted, total, self.batch)]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], total], strict=True)]


def observe_weights(model: StreamedModel, parameters: Sequence[WeightParameter]) -> dict[str, tuple[WeightParameter, Observed]]:
    """Return the weights of parameters as they lie in a loaded model, by their names."""
    observed: dict[str, tuple[WeightParameter, Observed]] = {}
    for parameter in parameters:
        live = model.model.get_parameter(parameter.name)
        for part, view in zip(parameter.parts(), parameter.views(live), strict=True):
            observed[part] = (parameter, Observed(part, view, not parameter.transposed, bool(parameter.experts)))
    return observed


def token_weights(name: str) -> str:
    """Return the key of the token weights of a weight's input among the results of `measure_gradients`."""
    return f"tokens of {name}"


def output_gram_of(name: str) -> str:
    """Return the key of a weight's output_gram among the results of `measure_gradients`."""
    return f"outputs of {name}"


class StatisticsVisitor:
    """Collects the statistics of every weight of a block and moves the hidden states past it, with nothing compressed."""

    def __init__(self, stream: CalibrationStream) -> None:
        self.stream = stream
        self.found: Measured | None = None

    def visit_(self, block: LoadedBlock) -> None:
        stream = self.stream
        observed = stream.observe(list_weights(stream.model, block.index, ())[0])
        self.found = stream.capture_(block.index, observed, {}, goes_on=stream.goes_on(block), final=True)
