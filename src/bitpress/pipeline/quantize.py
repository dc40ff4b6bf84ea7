"""The main job: plan, compress block by block into a journal, stage, prove, publish."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitpress import native
from bitpress.calibration import Samples
from bitpress.calibration.stats import of_origin
from bitpress.checkpoints.compressed import (
    HEAD_NAME,
    JOB_DIRECTORY,
    OUTER_NAME,
    VERSION,
    CompressedCheckpoint,
    config_marks,
)
from bitpress.checkpoints.jsonfile import write_json_bytes
from bitpress.checkpoints.records import FileRecord, Manifest
from bitpress.checkpoints.side_files import SideFiles, read_side_file
from bitpress.checkpoints.source import encode_config
from bitpress.devices import CPU
from bitpress.errors import BitpressError, NumericsError, UsageError
from bitpress.measure.evaluation import check_reloaded, evaluate
from bitpress.measure.runtimes import check_loads, check_opens, choose_opened, draw_prompts, measure_prompt_cost
from bitpress.measure.samples import draw_calibration, draw_evaluation
from bitpress.memory import release
from bitpress.models.opening import OriginalLoader, open_original
from bitpress.models.streaming import StreamedModel
from bitpress.models.walk import LoadedBlock
from bitpress.pipeline.blocks import BlockCompressor
from bitpress.pipeline.budget import choose_formats, plan_method
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.clock import Clock
from bitpress.pipeline.device_memory import check_device
from bitpress.pipeline.finished import find_finished
from bitpress.pipeline.front_matter import front_matter
from bitpress.pipeline.gradients import measure_gradients
from bitpress.pipeline.identity import identify, recorded
from bitpress.pipeline.journal import Job, check_vacant
from bitpress.pipeline.network import learn_committed
from bitpress.pipeline.oddities import note_oddities
from bitpress.pipeline.outer_weights import compress_outer, compress_tables
from bitpress.pipeline.plan import Plan, check_memory, check_room
from bitpress.pipeline.records import BlockRecord, LayerRow, TunedSpan
from bitpress.pipeline.report import TEXTS, make_report, write_report_page, write_texts_
from bitpress.pipeline.units import Work
from bitpress.pipeline.windows import compress_blocks
from bitpress.progress import Progress, Silent
from bitpress.recipes import Method, Recipe, build_method
from bitpress.report.document import REPORT_NAME
from bitpress.runtime.prompt import read_generation_file
from bitpress.runtime.sampling import GENERATION
from bitpress.settings import use_native
from bitpress.stopping import stoppable

__all__ = ["Committer", "Proof", "Run", "finish_job", "plan_opened", "plan_run", "quantize_directory", "shard_name"]

GRADIENTS = "gradients.safetensors"


@dataclass(frozen=True)
class Run:
    """What a run has opened, planned and drawn before it writes; `samples` are the calibration's, where the method needs any."""

    path: Path
    model: StreamedModel
    loader: OriginalLoader
    method: Method
    plan: Plan
    samples: Samples | None


class Proof:
    """What the proof at the end measures, and what it must not exceed. It decides no byte of the model."""

    def __init__(
        self, tokens: int = 8192, length: int = 512, text: str = "builtin:heldout", max_kl: float | None = None
    ) -> None:
        if tokens < 0 or length < 2:
            raise UsageError(
                f"the proof needs 0 tokens (no proof) or more and a length of 2 or more, got {tokens} and {length}."
            )
        if max_kl is not None and not 0 <= max_kl < math.inf:
            raise UsageError(f"max_kl={max_kl:g}: it is a KL divergence in nats a token, 0 or more, such as 0.05.")
        if max_kl is not None and not tokens:
            raise UsageError(f"max_kl={max_kl:g} needs the proof, which 0 proof tokens leave out; leave out one of them.")
        self.tokens, self.length, self.text, self.max_kl = tokens, length, text, max_kl


def plan_run(model: Path, method: Method, device: torch.device = CPU) -> tuple[Plan, StreamedModel, OriginalLoader]:
    """Open a model and plan a run on a device without writing anything."""
    streamed, loader = open_original(model, method.compute, method.rotate, device=device)
    plan = plan_opened(streamed, loader, method)
    if method.reads_text:
        streamed.task.check_directory(model)
    side = loader.source.side_files()
    if GENERATION in side.carried:  # whoever opens the result reads it
        read_generation_file(side.carried[GENERATION])
    plan = replace(plan, side_bytes=side.nbytes, given=loader.source.given, disk=plan.disk + side.nbytes)
    return plan, streamed, loader


def plan_opened(model: StreamedModel, loader: OriginalLoader, method: Method) -> Plan:
    """Plan a run over a model that is open, its side files not counted."""
    plan = plan_method(model, method, loader.stored_bytes(model.model.state_dict()))
    return replace(plan, source_bytes=plan.source_bytes - loader.untied_bytes(), untied=loader.untied)


def quantize_directory(
    model: Path,
    out: Path,
    recipe: Recipe | Method,
    *,
    strict: bool = False,
    force: bool = False,
    proof: Proof | None = None,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model directory into `out` by a recipe, or the method of one, and give the report.

    The same call resumes an interrupted run; a finished one gives its report again. Raises UsageError, FormatError,
    CalibrationError (2), CheckpointError (3), DiskError (4), MemoryLimitError (5), NumericsError (6), JobStopped (75).
    """
    progress, proof = progress or Silent(), proof or Proof()
    started = time.perf_counter()
    check_vacant(out)
    method = (build_method(recipe) if isinstance(recipe, Recipe) else recipe).computed_on(device)
    calibration = method.recipe.calibration
    plan, streamed, loader = plan_run(model, method, device)
    check_memory(plan)
    check_device(streamed, method, plan)
    if proof.tokens and method.reads_text and proof.text == calibration.text:
        raise UsageError(f"{proof.text}: is the calibration text; the proof needs a text that calibration never saw.")
    if proof.tokens:  # a proof that cannot be made is better known now than at the end
        config = streamed.model.config
        draw_evaluation(proof.text, streamed.task, model, config, count=proof.tokens, length=proof.length)
    samples = None
    if method.reads_text:
        samples = draw_calibration(calibration, streamed.task, model, streamed.model.config)
    run = Run(model, streamed, loader, method, plan, samples)
    identity = identify(loader.source.hashes(), None if samples is None else samples.sha256, method, device)
    finished = find_finished(out, identity, force)
    if finished is not None:
        progress.note(f"{out} holds this very model already; nothing was done.")
        return finished
    note_oddities(plan, method, out, strict, progress)
    check_room(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    job = Job.open(out, identity, force=force)
    try:
        with stoppable() as check_stop:
            run, seconds = _compress(job, run, strict, check_stop, progress)
            if samples is not None:
                begun = time.perf_counter()
                parts = (run.model, run.method, run.plan.weights, samples)
                learn_committed(job, *parts, strict=strict, check_stop=check_stop, progress=progress)
                seconds += time.perf_counter() - begun
            return finish_job(job, run, proof, progress, check_stop, Clock(started, seconds, device))
    finally:
        job.close()


class Committer:
    """A visitor that takes every compressed block's rows, and hands the block to the journal where there is one.

    `resumable`: with the hidden states that feed the next block.
    """

    def __init__(
        self, job: Job | None, compressor: BlockCompressor, total: int, progress: Progress, *, resumable: bool = True
    ) -> None:
        self.job, self.compressor, self.total, self.progress, self.resumable = job, compressor, total, progress, resumable
        self.rows: list[LayerRow] = []
        self.tuned: list[TunedSpan] = []
        self.waiting: list[Work] = []  # blocks that are committed with the next one only

    def visit_(self, block: LoadedBlock) -> None:
        made = self.compressor.made
        record = made.record()
        self.rows += record.rows
        self.tuned += record.tuned
        if self.job is not None:
            stream = self.compressor.stream
            after = stream.state if self.resumable and stream.goes_on(block) else None
            shard = shard_name(block.index + 1, self.total)
            self.waiting.append(Work(block.name, shard, made.tensors(), record.dump()))
            if not self.compressor.joined:
                works, self.waiting = self.waiting, []
                self.job.commit_together_behind(works, after)
        self.progress.advance(block.name, error=record.error)


def _compress(job: Job, run: Run, strict: bool, check_stop: Callable[[], None], progress: Progress) -> tuple[Run, float]:
    """Do the units that the journal lacks; return the run, with the formats chosen that a budget buys, and the seconds that took."""
    started = time.perf_counter()
    model, method = run.model, run.method
    inputs = None if run.samples is None else run.samples.inputs
    stored = run.loader.stored_bytes(model.model.state_dict())
    plan, kept = choose_formats(job, run.plan, model, method, stored, inputs, check_stop, progress)
    run = replace(run, plan=plan)
    head = next((found for found in plan.outer if found.last), None)
    total = plan.blocks + 1 + (head is not None)
    if len(job.units) == total:
        return run, 0.0
    if use_native() and not native.available():
        progress.note("the native library is not built for this version; everything is computed in torch, slower")
    outer = model.load_outer_()
    inputs = inputs if method.follows_text else None  # what formats cost has been measured
    held_out = None if run.samples is None or inputs is None else run.samples.held_out
    kept |= _keep_gradients(job, run, check_stop, progress)
    gradients = job.kept(GRADIENTS) if of_origin(method.needs, "loss") else None
    # Hidden states of the unit that is being written are read until it is; only then may the next block overwrite them.
    stream = CalibrationStream(
        model,
        method.needs,
        batch=method.recipe.batch,
        follows_original=method.recipe.calibration.inputs == "original",
        feeds_head=head is not None,
        gradients=gradients,
        check_stop=check_stop,
        before_advance=job.settle,
        keeps_original=method.keeps_original,
    )
    progress.begin("quantizing", total, len(job.units))
    if job.units:
        _gather(job)  # a journal that does not hold records is refused now, not after the last block
        progress.note(f"resuming after {job.units[-1].unit}")
    done = len(job.units)
    of_head = None if head is None else outer[head.planned.parameter.name]
    if not done:
        made, decoded = compress_tables(plan.outer, outer, strict=strict)
        stream.start_(inputs, None, partial(model.fill_outer_, decoded), held_out)
        record = made.record().model_copy(update={"kept": kept or None})
        job.commit("outer", OUTER_NAME, made.tensors(), record.dump(), stream.state)
        progress.advance("outer")
        del made, decoded
    else:
        stream.start_(inputs, job.activations(), held_out=held_out)
    del outer
    compressor = BlockCompressor(stream, method, plan.weights, strict=strict, progress=progress)
    committer = Committer(job, compressor, plan.blocks + 1, progress)
    compress_blocks(compressor, [committer], first=max(done - 1, 0), check_stop=check_stop)
    job.settle()
    if head is not None and of_head is not None:
        stats = stream.capture_head(head.planned.parameter, head.method.needs)
        look = partial(stream.look_at_head, head.planned.parameter)
        made, _ = compress_outer(head, of_head.to(model.device), stats, look, strict=strict)
        record = made.record()
        job.commit("head", HEAD_NAME, made.tensors(), record.dump(), None)
        progress.advance("head", error=record.error)
    model.drop_outer_()
    return run, time.perf_counter() - started


def _keep_gradients(job: Job, run: Run, check_stop: Callable[[], None], progress: Progress) -> dict[str, str]:
    """Measure what the method asks of the loss before the first unit, if anything; return the hashes of what is kept."""
    felt = of_origin(run.method.needs, "loss")
    if not felt or job.units:
        return {}
    assert run.samples is not None
    found = measure_gradients(run.model, run.plan.by_block(), run.samples.inputs, felt, check_stop, progress)
    return job.keep(GRADIENTS, found)


def finish_job(
    job: Job, run: Run, proof: Proof, progress: Progress, check_stop: Callable[[], None], clock: Clock
) -> dict[str, Any]:
    """Stage what a job holds, reload and prove it, write the report, publish."""
    release()
    loader, samples, task = run.loader, run.samples, run.model.task
    facts = _gather(job)
    further = samples.held_out if samples is not None and any(row.held_out for row in facts.rows) else None
    side = loader.source.side_files()
    files = _side_files(loader, side)
    manifest = _manifest(job, loader, run.method, files, facts)
    job.stage(files)
    try:
        manifest, figures = _prove(job, run, manifest, facts, proof, progress, check_stop)
        recipe = job.identity["recipe"]
        head = front_matter(run.path, f"{recipe['budget']['bits']:g}-bits" if "budget" in recipe else recipe["weights"])
        base = head.get("base_model")
        report = make_report(
            figures,
            facts.rows,
            facts.tuned,
            run.plan,
            job.identity,
            model=base if isinstance(base, str) else run.path.name,
            auto_class=task.auto_class,
            compressed=facts.weights.keys(),
            calibration=None if samples is None else {**task.count(samples.inputs), "kinds": _counts(samples.kinds)},
            held_out=0 if further is None else len(further),
            source_bytes=loader.source.nbytes,
            given=loader.source.given,
            left_out=list(loader.names.left_out),
            left_behind=side.left,
            timing=clock.facts(),
        )
        written = write_json_bytes(manifest.model_dump(mode="json"))
        others = len(written) + sum(unit.bytes for unit in job.units) + sum(map(len, files.values()))
        texts = write_texts_(report, job.out.name, head, task, others)
        job.stage(texts | write_report_page(texts[REPORT_NAME], job.out.name))
    except BitpressError:  # of what is not published, nothing lies where a model would
        job.unstage([*files, *TEXTS])
        raise
    job.publish({}, written)
    return report


def _prove(
    job: Job,
    run: Run,
    manifest: Manifest,
    facts: BlockRecord,
    proof: Proof,
    progress: Progress,
    check_stop: Callable[[], None],
) -> tuple[Manifest, dict[str, Any]]:
    """Reload what is staged as its users will, and measure it; return the manifest with the cost in prompts, and the figures."""
    checkpoint = CompressedCheckpoint.open(job.out, manifest=manifest)
    check_reloaded(checkpoint, facts.digests, check_stop)
    check_loads(checkpoint, check_stop)
    if (run.samples is not None or proof.tokens) and choose_opened(checkpoint) == "native":
        prompts = run.samples.inputs if run.samples is not None else draw_prompts(run.path, run.model)
        manifest = manifest.model_copy(update={"prompt_cost": measure_prompt_cost(checkpoint, prompts, progress)})
        checkpoint = replace(checkpoint, manifest=manifest)
    if proof.tokens:
        figures = evaluate(
            job.out,
            run.path,
            text=proof.text,
            tokens=proof.tokens,
            length=proof.length,
            checkpoint=checkpoint,
            with_runtime=True,
            device=run.model.device,
            progress=progress,
        )
    else:
        figures = {"bits_per_weight": checkpoint.bits_per_weight, "bytes": checkpoint.nbytes}
        check_opens(checkpoint, progress)
    check_stop()
    if proof.max_kl is not None and figures.get("kl_mean", 0.0) > proof.max_kl:
        raise NumericsError(
            f"{job.out}: the KL divergence from the original is {figures['kl_mean']:.4f}, above --max-kl {proof.max_kl:g}; "
            f"nothing is published. The compressed blocks are kept in {JOB_DIRECTORY}: the same command with a higher limit "
            "publishes them without quantizing again, and --force starts anew with more bits or another method."
        )
    return manifest, figures


def shard_name(i: int, total: int) -> str:
    """Name the weight file of a unit: what is in no block first, then one block after the other."""
    return OUTER_NAME if i == 0 else f"bitpress-{i:05d}-of-{total - 1:05d}.safetensors"


def _gather(job: Job) -> BlockRecord:
    journal = str(job.root / "journal.jsonl")
    return BlockRecord.merge(BlockRecord.read(f"{journal}:{n}", unit.facts) for n, unit in enumerate(job.units, 1))


def _side_files(loader: OriginalLoader, side: SideFiles) -> dict[str, bytes]:
    """Make the configuration; take over what goes with the model."""
    config = {k: v for k, v in loader.config.items() if k not in ("auto_map", "transformers_weights")}
    config |= config_marks()
    files = {name: read_side_file(path) for name, path in side.carried.items()}
    files["config.json"] = encode_config(config)
    return files


def _manifest(job: Job, loader: OriginalLoader, method: Method, files: Mapping[str, bytes], facts: BlockRecord) -> Manifest:
    import hashlib

    records = {u.shard: FileRecord(bytes=u.bytes, sha256=u.sha256) for u in job.units}
    for name, content in files.items():
        records[name] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return Manifest(
        bitpress=VERSION,
        files=records,
        weights=facts.weights,
        aliases=loader.aliases,
        left_out=list(loader.names.left_out),
        recipe=recorded(method),
        job=job.identity,
        attention=facts.attention,
    )


def _counts(kinds: Sequence[str]) -> dict[str, int]:
    return {kind: list(kinds).count(kind) for kind in dict.fromkeys(kinds)}
