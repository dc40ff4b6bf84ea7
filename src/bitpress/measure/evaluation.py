"""The proof: run the original and the compressed model over held-out text, block by block, and measure the distance.

Two distances: that of the weights, in float32, and that of the runtime which the user gets, with its own types and roundings.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Integer as Int

from bitpress.calibration.samples import Windows
from bitpress.checkpoints.budget import open_within
from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.errors import MemoryLimitError, NumericsError, UsageError
from bitpress.evaluation import measure_distance
from bitpress.evaluation.distance import measure_perplexity
from bitpress.formats.digest import digest
from bitpress.measure.runtimes import Runtime, choose_opened, native_runtime, opening, transformers_runtime
from bitpress.measure.windows import load_windows
from bitpress.models.opening import open_streamed
from bitpress.models.skeleton import check_tokens
from bitpress.models.streaming import StreamedModel
from bitpress.models.walk import Stream, walk
from bitpress.progress import Progress, Silent
from bitpress.runtime.native.options import USUAL, EngineOptions
from bitpress.runtime.opening import OpenedModel

__all__ = ["check_reloaded", "compare", "evaluate", "evaluate_alone", "evaluation_windows", "measure_runtime"]

# Windows that go through a block together while proving.
BATCH = 4
# Tokens that go through the runtime itself in a proof: its distance is a second figure, and need not cost what the first does.
RUNTIME_TOKENS = 2048


def _prepared(model: StreamedModel, windows: torch.Tensor, progress: Progress) -> Stream:
    """Run windows through a model, one block in memory at a time; its outer parts stay loaded for the logits."""
    model.load_outer_()
    stream = Stream(model, windows.split(BATCH))
    stream.start_()
    walk(model, [stream], note=progress.advance)
    return stream


def compare(
    candidate: StreamedModel,
    original: StreamedModel,
    windows: Int[torch.Tensor, "windows length"],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a candidate against an original on given windows. Raises NumericsError when logits are not finite."""
    progress = progress or Silent()
    progress.begin("evaluating", 2 * len(original.blocks))
    return _compare(_prepared(original, windows, progress), _prepared(candidate, windows, progress), windows, progress)


def _compare(p: Stream, q: Stream, windows: torch.Tensor, progress: Progress) -> dict[str, Any]:
    progress.begin("evaluating, logits", windows.shape[0])  # a window takes another time than a block
    distance = measure_distance(p.scorer(), q.scorer(), windows, lambda done: progress.advance(f"window {done}"))
    return {**dataclasses.asdict(distance), "tokens_per_second": windows.numel() / q.seconds}


def evaluate(
    directory: str | Path,
    against: str | Path,
    *,
    text: str = "builtin:heldout",
    tokens: int = 8192,
    length: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pressed: CompressedCheckpoint | None = None,
    memory: int | str | None = None,
    runtime: str | None = None,
    engine: EngineOptions = USUAL,
    with_runtime: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a compressed (or any other) model directory with the original on held-out text.

    Gives kl_mean, kl_ci95, top1_agreement, perplexity, perplexity_original, bits_per_weight and bytes (from what is stored),
    tokens and tokens_per_second (tokens that the candidate's decoded weights scored per second, loading left out).
    With `memory`, a model of stacks is read only so far (`checkpoints.budget`), and bits and bytes are those of what is read.
    runtime         measure what this runtime gives ("native", "transformers", "auto": the one that `run` chooses) in place of the
                    decoded weights in float32
    engine          options of the native engine
    with_runtime    add `runtime`: the distance through the runtime that `run` chooses, with its defaults, on at most RUNTIME_TOKENS
    Raises CheckpointError, CalibrationError, NumericsError, UsageError, KernelUnavailable, MemoryLimitError.
    """
    progress = progress or Silent()
    directory, against = Path(directory), Path(against)
    if pressed is None and memory is not None:
        pressed = open_within(directory, memory)
    if pressed is None and is_compressed(directory):
        pressed = CompressedCheckpoint.open(directory)
    chosen = _open_runtime(directory, pressed, runtime, engine)
    original = open_streamed(against, dtype)
    candidate = open_streamed(directory, dtype if chosen is None or chosen.dtype is None else chosen.dtype, pressed)
    windows = evaluation_windows(text, against, original.model.config, tokens=tokens, length=length, seed=seed)
    check_tokens(windows.tokens, candidate.model.config, str(directory))
    progress.begin("evaluating", (1 if chosen is not None and chosen.engine is not None else 2) * len(original.blocks))
    p = _prepared(original, windows.tokens, progress)
    if chosen is not None and chosen.engine is not None:
        figures = _through_engine(p, chosen, windows.tokens)
    else:
        q = _prepared(candidate, windows.tokens, progress)
        figures = _compare(p, q, windows.tokens, progress)
        if with_runtime and pressed is not None:
            first = windows.tokens[: max(RUNTIME_TOKENS // windows.tokens.shape[1], 1)]
            figures["runtime"] = measure_runtime(p, q, pressed, first, progress)
    if chosen is not None:
        figures["runtime"] = {"name": chosen.name, "settings": dict(chosen.settings)}
    stored: dict[str, Any] = {"bits_per_weight": None, "bytes": None}
    if pressed is not None:
        stored = {"bits_per_weight": pressed.bits_per_weight, "bytes": pressed.nbytes}
    return {**figures, **stored, "text": text, "text_sha256": windows.sha256, "length": windows.tokens.shape[1], "seed": seed}


def evaluation_windows(text: str, model: Path, config: Any, *, tokens: int, length: int, seed: int = 0) -> Windows:
    """Draw the windows that a proof measures on. Raises CheckpointError, CalibrationError."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    length = min(length, limit, max(tokens, 2))
    windows = load_windows(text, model, samples=max(tokens // length, 1), length=length, seed=seed)
    check_tokens(windows.tokens, config, str(model))
    return windows


def evaluate_alone(
    directory: str | Path,
    *,
    text: str = "builtin:heldout",
    tokens: int = 8192,
    length: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pressed: CompressedCheckpoint | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a model directory, compressed or not, on held-out text, without an original beside it.

    Gives perplexity with the ends of its 95 % interval (None for a single window), tokens, windows, bits_per_weight and bytes (None
    for a model that bitpress did not write) and tokens_per_second; the rest is as for `evaluate`, and so is the perplexity.
    """
    directory, progress = Path(directory), progress or Silent()
    if pressed is None and memory is not None:
        pressed = open_within(directory, memory)
    if pressed is None and is_compressed(directory):
        pressed = CompressedCheckpoint.open(directory)
    model = open_streamed(directory, dtype, pressed)
    windows = evaluation_windows(text, directory, model.model.config, tokens=tokens, length=length, seed=seed)
    progress.begin("evaluating", len(model.blocks))
    prepared = _prepared(model, windows.tokens, progress)
    progress.begin("evaluating, logits", windows.tokens.shape[0])
    seen = measure_perplexity(prepared.scorer(), windows.tokens, lambda done: progress.advance(f"window {done}"))
    figures = {**dataclasses.asdict(seen), "tokens_per_second": windows.tokens.numel() / prepared.seconds}
    if seen.windows == 1:
        figures |= {"perplexity_low": None, "perplexity_high": None}
    stored = {"bits_per_weight": pressed and pressed.bits_per_weight, "bytes": pressed and pressed.nbytes}
    return {**figures, **stored, "text": text, "text_sha256": windows.sha256, "length": windows.tokens.shape[1], "seed": seed}


def _open_runtime(
    directory: Path, pressed: CompressedCheckpoint | None, runtime: str | None, options: EngineOptions
) -> Runtime | None:
    if runtime is None:
        if options.chosen():
            raise UsageError(f"{', '.join(options.chosen())}: of a runtime; name the runtime native.")
        return None
    if pressed is None:
        raise UsageError(f"{directory}: bitpress did not write it, so it has no runtime here; leave the runtime out.")
    if pressed.cut and runtime != "transformers":
        raise UsageError("a model of stacks is read in part by the runtime transformers only; name it, or leave memory out.")
    selection = OpenedModel.of(pressed).select(runtime, native=options.chosen(), head=options.head_format)
    return native_runtime(pressed, options) if selection.runtime == "native" else transformers_runtime(pressed)


def _through_engine(p: Stream, runtime: Runtime, windows: torch.Tensor) -> dict[str, Any]:
    seconds = 0.0

    def timed(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal seconds
        start = time.perf_counter()
        logits = runtime.logits(tokens)
        seconds += time.perf_counter() - start
        return logits

    distance = measure_distance(p.scorer(), timed, windows)
    return {**dataclasses.asdict(distance), "tokens_per_second": windows.numel() / seconds}


def measure_runtime(
    p: Stream, q: Stream, pressed: CompressedCheckpoint, windows: Int[torch.Tensor, "windows length"], progress: Progress
) -> dict[str, Any]:
    """Measure the runtime that `run` would choose for a directory, with its defaults: name, settings and distance.

    p and q are the original and the decoded weights, prepared for these windows first. Where the engine has no room, `unmeasured` says so
    in place of figures. Raises CheckpointError where it does not open what was written.
    """
    name = choose_opened(pressed)
    with opening(pressed, f"the runtime {name}"):
        try:
            runtime = native_runtime(pressed) if name == "native" else transformers_runtime(pressed)
        except MemoryLimitError as error:
            progress.note(str(error))
            return {"name": name, "settings": {}, "unmeasured": str(error)}
        if runtime.engine is not None:
            candidate: Any = runtime.logits
        elif runtime.dtype == q.model.dtype:
            candidate = q.scorer()
        else:
            assert runtime.dtype is not None
            progress.begin("evaluating, as loaded", len(q.model.blocks))
            candidate = _prepared(open_streamed(pressed.root, runtime.dtype, pressed), windows, progress).scorer()
        distance = measure_distance(p.scorer(), candidate, windows)
    return {"name": name, "settings": dict(runtime.settings), **dataclasses.asdict(distance)}


def check_reloaded(
    pressed: CompressedCheckpoint, digests: Mapping[str, str], check_stop: Callable[[], None] = lambda: None
) -> None:
    """Raise NumericsError unless every weight, read again from its file, decodes to what it was in memory, bit for bit."""
    for name, expected in digests.items():
        check_stop()
        if digest(pressed.read_weight(name).dequantize()) != expected:
            raise NumericsError(f"{pressed.root}: {name} decodes to other values than it had in memory; nothing is published.")
