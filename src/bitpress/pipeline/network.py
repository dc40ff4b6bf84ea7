"""Learn all blocks at once by what the model says: the last pass of a run, over blocks that are compressed already.

    teacher    the original runs block by block over the calibration text, and its likeliest tokens are kept
    student    every compressed block is held, decoded where nothing of it is learned and packed elsewhere; a block's learned weights are
               decoded where it runs (`tuning.wide_objectives`)
    result     blocks whose tensors changed are written to files of other names, and take the places of the former ones all at once

Nothing is written before the pass is over, so a run that is stopped in it does the pass again, from the same blocks.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bitpress.calibration import Samples
from bitpress.checkpoints.safetensors_file import read_header, read_tensor
from bitpress.errors import NumericsError
from bitpress.exchange.bitpress_directory import BitpressDirectory
from bitpress.finite import all_finite
from bitpress.formats import AttentionOperands, CompressedLayer, CompressedWeight
from bitpress.formats.digest import digest
from bitpress.models.streaming import StreamedModel
from bitpress.models.walk import LoadedBlock, Stream, Visitor, walk
from bitpress.pipeline.blocks import BlockCompressor, check_early
from bitpress.pipeline.journal import Job
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import BlockRecord, TunedSpan
from bitpress.pipeline.tuning import begin_vectors, begin_weights, block_runs, windows_counted
from bitpress.pipeline.units import Unit, Work
from bitpress.pipeline.weights import CompressedBlock, CompressedParameter
from bitpress.pipeline.windows import compress_blocks
from bitpress.progress import Progress, Stepwise
from bitpress.recipes import Method, Named
from bitpress.tuning.learned import Learned
from bitpress.tuning.tuner import Curve, Tuning, tune_
from bitpress.tuning.wide_objectives import NetworkObjective, Teacher

__all__ = ["compress_all", "learn_committed", "learn_network", "teach"]


def learn_network(
    model: StreamedModel,
    method: Method,
    planned: Sequence[PlannedWeight],
    blocks: Sequence[CompressedBlock],
    outer: Mapping[str, CompressedParameter],
    samples: Samples,
    *,
    strict: bool,
    check_stop: Callable[[], None],
    progress: Progress,
) -> list[int]:
    """Learn what a method says of the whole network, put it into the blocks, and return the numbers of those whose tensors changed.

    `outer` are the compressed parameters that are in no block. The last block gets the rows of the report.
    Leaves the model without blocks. Raises NumericsError where the start has no finite loss.
    """
    tunings = method.tunings_of("network")
    progress.begin("learning the network", len(tunings) + 1)
    texts = samples.inputs if samples.held_out is None else torch.cat([samples.inputs, samples.held_out])
    counted = windows_counted(len(samples.inputs), len(texts))
    teaches = any(named.part.loss == "kl-top" for named in tunings)
    teacher = teach(model, texts, method.recipe.batch, check_stop) if teaches else None
    progress.advance("the original")
    changed = set[int]()
    try:
        model.fill_outer_(
            {name: made.parameter.restore(made.weight.dequantize()) for name, made in outer.items()},
            {name: made.layer for name, made in outer.items() if made.input is not None},
        )
        for named in tunings:
            learner = _Learner(model, named, planned, blocks, progress)
            row = learner.learn(texts, counted, teacher if named.part.loss == "kl-top" else None, check_stop)
            blocks[-1].tuned = [*blocks[-1].tuned, row]
            check_early([row], strict=strict)
            learner.note_()
            changed |= learner.take_() if row.kept else set()
            progress.advance(named.name, loss=row.after)
    finally:
        for i in range(len(model.blocks)):
            model.drop_block_(i)
    return sorted(changed)


def teach(model: StreamedModel, texts: torch.Tensor, batch: int, check_stop: Callable[[], None]) -> Teacher:
    """Run the original over the texts, and keep the tokens that it finds likeliest. Its outer parts must be loaded."""
    stream = Stream(model, texts.split(batch))
    stream.start_()
    walk(model, [stream], check_stop=check_stop)
    says = stream.scorer()
    found = list[Teacher]()
    for text in texts.split(1):
        check_stop()
        found.append(Teacher.of([says(text)]))
    return Teacher(torch.cat([one.tokens for one in found]), torch.cat([one.logits for one in found]))


class _Learner:
    """Learns a network by one tuning."""

    def __init__(
        self,
        model: StreamedModel,
        named: Named[Tuning],
        planned: Sequence[PlannedWeight],
        blocks: Sequence[CompressedBlock],
        progress: Progress,
    ) -> None:
        self.model, self.named, self.blocks, self.progress = model, named, blocks, progress
        self.notes = dict[str, list[str]]()
        self.weights = dict[str, Learned]()
        self.block_of = {name: i for i, block in enumerate(blocks) for name in (*block.parameters, *block.kept)}
        for block in blocks:
            own = [p for p in planned if p.parameter.name in block.parameters]
            tuning = named.part if own else replace(named.part, norms=0.0)  # a block without compressed weights stays
            packed = {name: p.weight.to(model.device) for name, p in block.parameters.items()}
            # The original of a block is what is stored: codes that a learned rounding changes begin at their own centres.
            originals = {name: weight.dequantize() for name, weight in packed.items()}
            begun = begin_weights(named.part, named.name, own, packed, originals, self.notes)
            kept = {name: t.to(model.device) for name, t in block.kept.items()}
            self.weights |= {**begun, **begin_vectors(tuning, model, kept, {})}
            fixed = {
                name: block.parameters[name].parameter.restore(w) for name, w in originals.items() if name not in self.weights
            }
            model.fill_({**fixed, **{name: t for name, t in kept.items() if name not in self.weights}})

    def learn(self, texts: torch.Tensor, counted: int, teacher: Teacher | None, check_stop: Callable[[], None]) -> TunedSpan:
        """Learn by texts, of which the first `counted` are learned from and the others are held out."""
        model, named, started = self.model, self.named, time.perf_counter()
        tuning, every = named.part, range(len(model.blocks))
        for size in {
            min(tuning.batch, counted),
            min(tuning.batch, len(texts) - counted),
            (len(texts) - counted) % tuning.batch,
        } - {0}:
            model.embed(texts[:size])
        hidden = torch.cat([model.embed(batch) for batch in texts.split(tuning.batch)])
        objective = NetworkObjective(
            block_runs(model, every, self.weights),
            model.says,
            texts,
            hidden,
            counted,
            model.task.loss,
            teacher,
            batch=tuning.batch,
            device=model.device,
        )

        def note(step: int, loss: float) -> None:
            if isinstance(self.progress, Stepwise):
                self.progress.step(named.name, step / tuning.steps, loss=loss)

        curve = tune_(objective, self.weights, tuning, 0, check_stop, note, lazily=True)
        if not math.isfinite(curve.before):
            raise NumericsError(f"{model.stack}: the loss of what {named.name} starts from is {curve.before:g}.")
        return self._row(curve, counted * hidden.shape[1], round(time.perf_counter() - started, 3))

    def _row(self, curve: Curve, tokens: int, seconds: float) -> TunedSpan:
        return TunedSpan(
            name=self.model.stack,
            tuning=self.named.name,
            span="network",
            steps=curve.steps,
            learned=sum(leaf.tensor.numel() for one in self.weights.values() for leaf in one.leaves()),
            tokens=tokens,
            before=curve.before,
            after=curve.after,
            kept=curve.better,
            calibration=list(curve.calibration),
            seconds=seconds,
            failed=curve.failed,
        )

    def note_(self) -> None:
        """Note in the blocks why weights stay."""
        for name, texts in self.notes.items():
            block = self.blocks[self.block_of[name]]
            for text in texts:
                block.put_(block.parameters[name].with_note(text))

    def take_(self) -> set[int]:
        """Put what was learned into the blocks; return their numbers."""
        for name, one in self.weights.items():
            block, result = self.blocks[self.block_of[name]], one.harden()
            if isinstance(result, CompressedWeight):
                block.put_(_replaced(block.parameters[name], result, self.named.name))
            else:
                block.kept[name] = result
        return {self.block_of[name] for name in self.weights}


def _replaced(made: CompressedParameter, weight: CompressedWeight, method: str) -> CompressedParameter:
    """Return a parameter with another weight, whose error is not measured again: no statistics of its input are left."""
    decoded = weight.dequantize()
    if not all_finite(decoded):
        raise NumericsError(f"{made.parameter.stem}: the learned weight is not finite.")
    entry = BitpressDirectory.write(CompressedLayer(weight, made.input)).entry
    record = made.record.model_copy(update={"spec": entry["spec"], "errors": None})
    sizes = {"bytes": weight.nbytes, "bits_per_weight": weight.bits_per_weight}
    row = made.row.model_copy(update=sizes)
    changed = replace(made, weight=weight, digest=digest(decoded), record=record, row=row)
    return changed.with_note(f"its error is that before {method} learned the network")


def learn_committed(
    job: Job,
    model: StreamedModel,
    method: Method,
    planned: Sequence[PlannedWeight],
    samples: Samples,
    *,
    strict: bool,
    check_stop: Callable[[], None],
    progress: Progress,
) -> None:
    """Learn the network of a job whose units are all committed, unless that is done already, and commit the blocks that changed."""
    if not method.tunings_of("network") or any(unit.replaces for unit in job.units):
        return
    names = [model.block_name(i) for i in range(len(model.blocks))]
    units = {unit.unit: unit for unit in job.units}
    model.load_outer_()
    try:
        blocks = [_read_block(job, units[name]) for name in names]
        outside = [_read_block(job, unit) for name, unit in units.items() if name not in names]
        outer = {name: made for one in outside for name, made in one.parameters.items()}
        changed = learn_network(
            model, method, planned, blocks, outer, samples, strict=strict, check_stop=check_stop, progress=progress
        )
    finally:
        model.drop_outer_()
    works = []
    for i, name in enumerate(names):
        unit, facts = units[name], blocks[i].record().dump()
        if i in changed:
            shard = unit.shard.replace("bitpress-", "bitpress-learned-", 1)
            works.append(Work(name, shard, blocks[i].tensors(), facts))
        elif facts != unit.facts:  # notes, or the rows of the report, beside the file that it had
            works.append(Work(name, unit.shard, None, facts))
    job.commit_together(works, None, replaces=True)


def compress_all(
    compressor: BlockCompressor,
    visitors: Sequence[Visitor],
    samples: Samples | None,
    *,
    check_stop: Callable[[], None],
    progress: Progress,
) -> None:
    """Compress a model without a journal, learn its network where the method says so, and hand every final block to the visitors.

    Where the network is learned, all compressed blocks are held at once.
    """
    method, model = compressor.method, compressor.stream.model
    if samples is None or not method.tunings_of("network"):
        compress_blocks(compressor, visitors, check_stop=check_stop)
        return
    collected = _Collected(compressor)
    compress_blocks(compressor, [collected], check_stop=check_stop)
    learn_network(
        model,
        method,
        compressor.planned,
        collected.blocks,
        {},
        samples,
        strict=compressor.weights.strict,
        check_stop=check_stop,
        progress=progress,
    )
    progress.begin("judging the network", len(collected.blocks))
    walk(model, [_Refilled(compressor, collected.blocks), *visitors], check_stop=check_stop)


class _Collected:
    """A visitor that keeps the compressed blocks."""

    def __init__(self, compressor: BlockCompressor) -> None:
        self.compressor, self.blocks = compressor, list[CompressedBlock]()

    def visit_(self, block: LoadedBlock) -> None:
        self.blocks.append(self.compressor.made)


class _Refilled:
    """A visitor that puts compressed blocks into the model again."""

    def __init__(self, compressor: BlockCompressor, blocks: Sequence[CompressedBlock]) -> None:
        self.compressor, self.blocks = compressor, blocks

    def visit_(self, block: LoadedBlock) -> None:
        made = self.compressor.made = self.blocks[block.index]
        decoded = {name: p.parameter.restore(p.weight.dequantize()) for name, p in made.parameters.items()}
        self.compressor.stream.model.fill_({**decoded, **made.kept})


def _read_block(job: Job, unit: Unit) -> CompressedBlock:
    """Read a committed unit."""
    record = BlockRecord.read(str(job.root / "journal.jsonl"), unit.facts)
    path = job.find(unit)
    entries = read_header(path)[0]
    tensors = {name: read_tensor(path, entry) for name, entry in entries.items()}
    rows, made = {row.name: row for row in record.rows}, dict[str, CompressedParameter]()
    order = {row.name: at for at, row in enumerate(record.rows)}
    found = [(stored.parameter(name), stored) for name, stored in record.weights.items()]
    # A line of the journal sorts its names, one that is still in memory does not: the rows have one order in both.
    for parameter, stored in sorted(found, key=lambda one: order[one[0].stem]):
        name = parameter.name
        own = {leaf: tensors.pop(f"{parameter.stem}.{leaf}") for leaf in CompressedLayer.expected(stored.spec, stored.input)}
        layer = CompressedLayer.build(stored.spec, own, stored.input)
        row = rows[parameter.stem]
        made[name] = CompressedParameter(parameter, layer.weight, record.digests[name], stored, row, layer.input)
    attention = {
        name: AttentionOperands.build(spec, {leaf: tensors.pop(f"{name}.{leaf}") for leaf in AttentionOperands.expected(spec)})
        for name, spec in record.attention.items()
    }
    weights = {one.parameter.stem for one in made.values()}
    notes = [row for row in record.rows if row.name not in weights]
    return CompressedBlock(made, tensors, notes, attention, record.tuned)
