"""The proof: run the original and the compressed model over held-out text, block by block, and measure the distance.

Two distances: that of the weights, in float32, and that of the runtime which the user gets, with its own types and roundings.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitpress.calibration import Samples
from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.checkpoints.width import open_part
from bitpress.devices import CPU
from bitpress.errors import MemoryLimitError, NumericsError, UsageError
from bitpress.evaluation.distance import by_kind, without_details
from bitpress.formats.digest import digest
from bitpress.measure.continuations import continue_texts
from bitpress.measure.runtimes import Runtime, choose_opened, native_runtime, opening, transformers_runtime
from bitpress.measure.samples import draw_evaluation
from bitpress.models.opening import open_streamed
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs, Task
from bitpress.models.walk import Stream, walk
from bitpress.progress import Progress, Silent
from bitpress.runtime.native.options import USUAL, EngineOptions
from bitpress.runtime.opening import OpenedModel

__all__ = ["check_reloaded", "compare", "evaluate", "evaluate_alone"]

# Samples that go through a block together while proving.
BATCH = 4
# Tokens that go through the runtime itself in a proof: its distance is a second figure, and need not cost what the first does.
RUNTIME_TOKENS = 2048


def _prepared(model: StreamedModel, inputs: torch.Tensor, progress: Progress) -> Stream:
    """Run inputs through a model, one block in memory at a time; its outer parts stay loaded for the outputs."""
    model.load_outer_()
    stream = Stream(model, inputs.split(BATCH))
    stream.start_()
    walk(model, [stream], note=progress.advance)
    return stream


def compare(
    candidate: StreamedModel,
    original: StreamedModel,
    inputs: Inputs,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a candidate against an original on given inputs. Raises NumericsError when outputs are not finite."""
    progress = progress or Silent()
    progress.begin("evaluating", 2 * len(original.blocks))
    return _compare(_prepared(original, inputs, progress), _prepared(candidate, inputs, progress), inputs, progress)


def _compare(p: Stream, q: Stream, inputs: torch.Tensor, progress: Progress) -> dict[str, Any]:
    progress.begin("evaluating, outputs", inputs.shape[0])  # a sample takes another time than a block
    task = p.model.task
    figures = task.distance(p.scorer(), q.scorer(), inputs, lambda done: progress.advance(f"sample {done}"))
    return {**figures, **_speed(task, inputs, q.seconds)}


def _speed(task: Task, inputs: torch.Tensor, seconds: float) -> dict[str, float]:
    return {f"{unit}_per_second": count / seconds for unit, count in task.count(inputs).items()}


def evaluate(
    directory: str | Path,
    against: str | Path,
    *,
    text: str = "builtin:heldout",
    tokens: int = 8192,
    length: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    checkpoint: CompressedCheckpoint | None = None,
    memory: int | str | None = None,
    width: int | None = None,
    runtime: str | None = None,
    engine: EngineOptions = USUAL,
    with_runtime: bool = False,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a compressed (or any other) model directory with the original on held-out text.

    Gives kl_mean, kl_ci95, top1_agreement, perplexity, perplexity_original, bits_per_weight and bytes (from what is stored),
    tokens and tokens_per_second (tokens that the candidate's decoded weights scored per second, loading left out), and of language models
    by_text and by_position, the distance on every kind of text and at the positions of a window.
    With `memory`, a model of stacks is read only so far (`checkpoints.budget`), with `width`, a nested one at so many bits a weight
    (`checkpoints.width`); bits and bytes are those of what is read.
    runtime         measure what this runtime gives ("native", "transformers", "auto": the one that `run` chooses) in place of the
                    decoded weights in float32
    engine          options of the native engine
    with_runtime    add `runtime`: the distance through the runtime that `run` chooses, with its defaults, on at most RUNTIME_TOKENS; and of
                    models that generate `continuations`: texts of both models
    device          where blocks and outputs are computed, but for runtimes, which are measured on the processor
    Raises CheckpointError, CalibrationError, NumericsError, UsageError, KernelUnavailable, MemoryLimitError.
    """
    progress = progress or Silent()
    directory, against = Path(directory), Path(against)
    checkpoint = checkpoint or _open_checkpoint(directory, memory, width)
    chosen = _open_runtime(directory, checkpoint, runtime, engine)
    original = open_streamed(against, dtype, device=device)
    own = dtype if chosen is None or chosen.dtype is None else chosen.dtype
    candidate = open_streamed(directory, own, checkpoint, device=device)
    task, config = original.task, original.model.config
    samples, length = draw_evaluation(text, task, against, config, count=tokens, length=length, seed=seed)
    inputs = samples.inputs
    task.check_inputs(inputs, candidate.model.config, str(directory))
    progress.begin("evaluating", (1 if chosen is not None and chosen.engine is not None else 2) * len(original.blocks))
    p = _prepared(original, inputs, progress)
    if chosen is not None and chosen.engine is not None:
        figures = _through_engine(p, chosen, inputs)
    else:
        q = _prepared(candidate, inputs, progress)
        figures = _compare(p, q, inputs, progress)
        if with_runtime and checkpoint is not None:
            first = inputs[: task.cut(config, RUNTIME_TOKENS, length)[0]]
            figures |= _as_run(p, q, checkpoint, first, samples, progress)
    if chosen is not None:
        figures["runtime"] = {"name": chosen.name, "settings": dict(chosen.settings)}
    if "kl_by_window" in figures:
        figures["by_text"] = [dataclasses.asdict(found) for found in by_kind(samples.kinds, figures.pop("kl_by_window"))]
    stored = {"bits_per_weight": checkpoint and checkpoint.bits_per_weight, "bytes": checkpoint and checkpoint.nbytes}
    return {**figures, **stored, "text": text, "text_sha256": samples.sha256, "length": length, "seed": seed}


def evaluate_alone(
    directory: str | Path,
    *,
    text: str = "builtin:heldout",
    tokens: int = 8192,
    length: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    checkpoint: CompressedCheckpoint | None = None,
    memory: int | str | None = None,
    width: int | None = None,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a model directory, compressed or not, on held-out text, without an original beside it.

    Gives perplexity with the ends of its 95 % interval (None for a single window), tokens, windows, bits_per_weight and bytes (None
    for a model that bitpress did not write) and tokens_per_second; the rest is as for `evaluate`, and so is the perplexity.
    """
    directory, progress = Path(directory), progress or Silent()
    checkpoint = checkpoint or _open_checkpoint(directory, memory, width)
    model = open_streamed(directory, dtype, checkpoint, device=device)
    task = model.task
    samples, length = draw_evaluation(text, task, directory, model.model.config, count=tokens, length=length, seed=seed)
    inputs = samples.inputs
    progress.begin("evaluating", len(model.blocks))
    prepared = _prepared(model, inputs, progress)
    progress.begin("evaluating, outputs", inputs.shape[0])
    figures = task.score(prepared.scorer(), inputs, lambda done: progress.advance(f"sample {done}"))
    figures |= _speed(task, inputs, prepared.seconds)
    stored = {"bits_per_weight": checkpoint and checkpoint.bits_per_weight, "bytes": checkpoint and checkpoint.nbytes}
    return {**figures, **stored, "text": text, "text_sha256": samples.sha256, "length": length, "seed": seed}


def _open_checkpoint(directory: Path, memory: int | str | None, width: int | None) -> CompressedCheckpoint | None:
    """Open what bitpress wrote, in part where that is asked for; None for another model."""
    part = open_part(directory, memory, width)
    return CompressedCheckpoint.open(directory) if part is None and is_compressed(directory) else part


def _open_runtime(
    directory: Path, checkpoint: CompressedCheckpoint | None, runtime: str | None, options: EngineOptions
) -> Runtime | None:
    if runtime is None:
        if options.chosen():
            raise UsageError(f"{', '.join(options.chosen())}: of a runtime; name the runtime native.")
        return None
    if checkpoint is None:
        raise UsageError(f"{directory}: bitpress did not write it, so it has no runtime here; leave the runtime out.")
    if checkpoint.cut and runtime != "transformers":
        raise UsageError("a model of stacks is read in part by the runtime transformers only; name it, or leave memory out.")
    selection = OpenedModel.of(checkpoint).select(runtime, native=options.chosen(), head=options.head_format)
    return native_runtime(checkpoint, options) if selection.runtime == "native" else transformers_runtime(checkpoint)


def _through_engine(p: Stream, runtime: Runtime, inputs: torch.Tensor) -> dict[str, Any]:
    seconds = 0.0

    def timed(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal seconds
        start = time.perf_counter()
        logits = runtime.logits(tokens)
        seconds += time.perf_counter() - start
        return logits

    figures = p.model.task.distance(p.scorer(), timed, inputs)
    return {**figures, **_speed(p.model.task, inputs, seconds)}


def _as_run(
    p: Stream, q: Stream, checkpoint: CompressedCheckpoint, inputs: Inputs, samples: Samples, progress: Progress
) -> dict[str, Any]:
    """Measure the runtime that `run` would choose for a directory, with its defaults: name, settings, distance, texts.

    p and q are the original and the decoded weights, prepared for these inputs first. Where the engine has no room, `unmeasured` says so
    in place of figures. Raises CheckpointError where it does not open what was written.
    """
    name = choose_opened(checkpoint)
    with opening(checkpoint, f"the runtime {name}"):
        try:
            runtime = native_runtime(checkpoint) if name == "native" else transformers_runtime(checkpoint)
        except MemoryLimitError as error:
            progress.note(str(error))
            return {"runtime": {"name": name, "settings": {}, "unmeasured": str(error)}}
        figures: dict[str, Any] = {"runtime": _measure_runtime(p, q, checkpoint, runtime, inputs, progress)}
    if p.model.task.generates:
        progress.begin("generating texts", 1)
        figures["continuations"] = continue_texts(p.model, checkpoint, runtime, samples).model_dump()
        progress.advance("texts")
    return figures


def _measure_runtime(
    p: Stream, q: Stream, checkpoint: CompressedCheckpoint, runtime: Runtime, inputs: Inputs, progress: Progress
) -> dict[str, Any]:
    """Measure a runtime that has opened a directory: name, settings and distance."""
    if runtime.engine is not None:
        candidate: Any = runtime.logits
    elif runtime.dtype == q.model.dtype:
        candidate = q.scorer()
    else:
        assert runtime.dtype is not None
        progress.begin("evaluating, as loaded", len(q.model.blocks))
        opened = open_streamed(checkpoint.root, runtime.dtype, checkpoint, device=q.model.device)
        candidate = _prepared(opened, inputs, progress).scorer()
    figures = without_details(p.model.task.distance(p.scorer(), candidate, inputs))
    return {"name": runtime.name, "settings": dict(runtime.settings), **figures}


def check_reloaded(
    checkpoint: CompressedCheckpoint, digests: Mapping[str, str], check_stop: Callable[[], None] = lambda: None
) -> None:
    """Raise NumericsError unless every weight, read again from its file, decodes to what it was in memory, bit for bit."""
    for name, expected in digests.items():
        check_stop()
        if digest(checkpoint.read_weight(name).dequantize()) != expected:
            raise NumericsError(
                f"{checkpoint.root}: {name} decodes to other values than it had in memory; nothing is published."
            )
