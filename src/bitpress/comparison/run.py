"""A comparison: many recipes on one model, where everything but the recipe is the same.

Recipes that calibrate on the original's inputs share the statistics of one pass over it. Held-out texts walk through the compressed
blocks as these are made, so that a recipe costs its own work and the head; nothing is written but a row, unless models are kept.
"""

import functools
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitpress.calibration import Samples
from bitpress.checkpoints.compressed import MANIFEST_NAME
from bitpress.checkpoints.jsonfile import read_json
from bitpress.comparison.results import Results
from bitpress.comparison.session import (
    Comparison,
    Timed,
    attempt,
    capture,
    drawn,
    known_of,
    make_compressor,
    noting,
    settled_plan,
)
from bitpress.comparison.statistics_cache import StatisticsCache, forget
from bitpress.comparison.tasks import choose_best, keys_of, measure_tasks, sure_to_answer, task_rows
from bitpress.comparison.variants import Variant
from bitpress.devices import CPU
from bitpress.errors import BitpressError, CheckpointError, NumericsError, UsageError
from bitpress.measure.evaluation_text import EvaluationText, distances
from bitpress.measure.multiple_choice import DOCUMENTS, Answers, count_batches, read_tasks, tokenize_tasks
from bitpress.measure.noise_floor import FLOOR_WINDOWS, measure_noise
from bitpress.measure.samples import draw_calibration, draw_evaluation
from bitpress.models.opening import open_original
from bitpress.pipeline.clock import Clock
from bitpress.pipeline.identity import identify, versions_on
from bitpress.pipeline.journal import Job
from bitpress.pipeline.network import compress_all
from bitpress.pipeline.plan import Plan, check_room
from bitpress.pipeline.quantize import Committer, Proof, Run, finish_job, plan_opened, shard_name
from bitpress.pipeline.records import BlockRecord, LayerRow, TunedSpan
from bitpress.progress import Progress, Silent
from bitpress.recipes import Calibration, Method, told_weights
from bitpress.stopping import stoppable

__all__ = ["HELDOUT", "compare_recipes"]

# Held-out texts of two kinds: one that the built-in calibration mix has too, one that it has not.
HELDOUT = {"speeches": "builtin:heldout:speeches", "reference": "builtin:heldout:reference"}


def compare_recipes(
    path: Path,
    out: Path,
    candidates: Sequence[Variant],
    texts: Mapping[str, str] = HELDOUT,
    *,
    shared: Calibration | None = None,
    tokens: int = 32768,
    length: int = 512,
    tasks: Sequence[str] = (),
    documents: int = DOCUMENTS,
    best: int = 3,
    keep: bool = False,
    forget_capture: bool = False,
    device: torch.device = CPU,
    progress: Progress | None = None,
    note_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure recipes on a model; give a row for each, and for the noise of the arithmetic.

    texts       held-out texts by name; `tokens` of each are taken in windows of `length`
    shared      the calibration of recipes that share one pass over the original
    tasks       multiple-choice tasks, by name or from files, that the original and the `best` recipes of every width answer at
                the end, by the first `documents` questions of each. The best are quantized a second time for scoring; if a bit
                width has at most `best` recipes, they are scored in the first pass
    keep        publish what every recipe makes in OUT/models
    device      where blocks, statistics and outputs are computed
    note_row    hears every row: what is there already first, then each as soon as it is done

    The same call goes on after what is there. A recipe that fails has a row with `failed`, and the others are done. Raises what
    `quantize_directory` raises for what is wrong before the first recipe or with the directory, JobStopped on a signal.
    """
    Results.check_vacant(out)
    if best < 1:
        raise UsageError(f"best={best}: at least 1 recipe of every width answers tasks.")
    candidates = [replace(c, method=c.method.computed_on(device)) for c in candidates]
    shared = shared or Calibration(inputs="original")
    made = _prepare(path, candidates, texts, shared, tokens, length, device, progress or Silent())
    if tasks:
        made.tasks = tokenize_tasks(read_tasks(tasks, documents, made.progress.note), path, made.model)
    for candidate, plan in made.plans.items():
        if made.calibration(candidate.method) is not None or keep:
            check_room(plan, out, 0 if keep else plan.disk)
    dtype, source = "bf16" if made.model.dtype == torch.bfloat16 else "fp32", made.loader.source.hashes()
    identity = {"comparison": 1, "source": source, "texts": made.hashes, "compute": dtype, **versions_on(device)}
    results = Results.open(out, identity)
    try:
        with stoppable() as check_stop:
            early = sure_to_answer(candidates, best) if tasks else ()
            _run(made, results, candidates, early, identity, source, keep, check_stop, note_row)
            rows = _rows(made, results, candidates)
            chosen = choose_best(rows, best)
            answers = measure_tasks(made, results, chosen, identity, check_stop, note_row) if tasks else []
        if forget_capture and all(not row["failed"] for row in (*rows.values(), *answers)):
            forget(out / "capture")
        told = {"model": str(path), "compute": dtype, "texts": _counts(made, texts)}
        floor, questions = results.find({"kind": "floor"}), {name: len(task.questions) for name, task in made.tasks.items()}
        return {**told, "floor": floor, "rows": list(rows.values()), "tasks": questions, "answers": answers}
    finally:
        results.close()


def _rows(made: Comparison, results: Results, candidates: Sequence[Variant]) -> dict[Variant, dict[str, Any]]:
    """Return the row of every recipe that has one, of a failed try if there is no other."""
    found = {c: results.find(known_of(made, c)) or results.find(known_of(made, c, failed=True)) for c in candidates}
    return {c: row for c, row in found.items() if row is not None}


def _counts(made: Comparison, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Say how much of each text was read."""
    return {name: {"source": texts[name], **made.model.task.count(inputs)} for name, inputs in made.texts.items()}


def _prepare(
    path: Path,
    candidates: Sequence[Variant],
    texts: Mapping[str, str],
    shared: Calibration,
    tokens: int,
    length: int,
    device: torch.device,
    progress: Progress,
) -> Comparison:
    """Open, plan and read everything: whatever cannot work is said here, before anything is written."""
    if len({(c.name, c.bits) for c in candidates}) < len(candidates) or not candidates:
        raise UsageError("a comparison needs recipes, each with a name of its own.")
    if tokens < 2 or length < 2:
        raise UsageError(f"texts need 2 tokens or more in windows of 2 or more, got {tokens} and {length}.")
    for name, text in texts.items():
        seen = next((c for c in candidates if c.method.reads_text and c.recipe.calibration.text == text), None)
        if seen is not None:
            raise UsageError(
                f"{name}: {text} is the calibration text of {seen.name}; the distance needs a text that it never saw."
            )
    if told := [f"{c.label} ({key})" for c in candidates for key in c.method.outer]:
        raise UsageError(
            f"{told[0]}: a comparison is of the blocks, and embeddings and head stay as stored; leave the key out here, and measure "
            "what it costs with `bitpress quantize`."
        )
    model, loader = open_original(path, candidates[0].method.compute, device=device)
    calibration: dict[Calibration, Samples] = {}
    plans: dict[Variant, Plan] = {}
    shared = shared.model_copy(update={"inputs": "original"})
    made = Comparison(path, model, loader, {}, {}, shared, calibration, {}, plans, progress)
    for c in candidates:
        try:
            plans[c] = plan_opened(*made.opened(c.method), c.method)
        except BitpressError as error:
            raise type(error)(f"{c.label}: {error}") from error
    task, config = model.task, model.model.config
    heldout = {name: draw_evaluation(text, task, path, config, count=tokens, length=length)[0] for name, text in texts.items()}
    wanted = {drawn(c.recipe.calibration) for c in candidates if c.method.reads_text}
    calibration |= {c: draw_calibration(c, task, path, config) for c in sorted(wanted, key=str)}
    made.texts |= {name: samples.inputs for name, samples in heldout.items()}
    made.hashes |= {name: samples.sha256 for name, samples in heldout.items()}
    return made


def _run(
    made: Comparison,
    results: Results,
    candidates: Sequence[Variant],
    early: Collection[Variant],
    identity: Mapping[str, Any],
    source: Mapping[str, str],
    keep: bool,
    check_stop: Callable[[], None],
    note_row: Callable[[dict[str, Any]], None],
) -> None:
    pending = []
    for c in candidates:
        known = results.find(known_of(made, c))
        if known is None or (keep and not _is_kept(made, c, results.out, source)):
            pending.append(c)
        else:
            note_row(known)
    floor = results.find({"kind": "floor"})
    if floor is None and made.model.dtype == torch.float32:
        results.add({"kind": "floor", "texts": None, "tokens": 0})
        floor = results.find({"kind": "floor"})
    if not pending and floor is not None:
        return
    made.model.load_outer_()
    captured = capture(made, results.out / "capture", identity, check_stop)
    try:
        if floor is None:
            results.add(_measure_floor(made, captured, check_stop))
        for c in pending:
            check_stop()
            keys = keys_of(made, c) if c in early else {}
            asked = [task for task, key in keys.items() if results.find(key) is None]
            work = functools.partial(_compress, made, captured, c, asked, results.out if keep else None, source, check_stop)
            found = attempt(made, work)
            answered = found.pop("answers", {})
            results.add(known_of(made, c) | found)
            note_row(results.rows[-1])
            for row in task_rows(keys, answered, found):
                results.add(row)
    finally:
        captured.close()


def _measure_floor(made: Comparison, captured: StatisticsCache, check_stop: Callable[[], None]) -> dict[str, Any]:
    """Measure the original as it computes here against itself in float32, on some windows of every text."""
    samples = sum(min(len(w), FLOOR_WINDOWS) for w in made.texts.values())
    made.progress.begin("noise of the arithmetic", len(made.model.blocks) + samples)
    return measure_noise(made.path, made.model, made.texts, captured.states(), noting(made, check_stop))


def _compress(
    made: Comparison,
    cached: StatisticsCache,
    c: Variant,
    tasks: Sequence[str],
    keep: Path | None,
    source: Mapping[str, str],
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Quantize the model by a variant while the evaluation texts walk along, and return the row's figures."""
    started, cpu = time.perf_counter(), time.process_time()
    model, _ = made.opened(c.method)
    outer = model.load_outer_() if c.method.rotate is not None or keep is not None else {}
    plan = settled_plan(made, c, check_stop)
    texts, answers = EvaluationText(model, made.texts), Answers(model, {name: made.tasks[name] for name in tasks})
    judges = Timed((texts, answers))
    compressor = make_compressor(made, cached, c, check_stop)
    texts.start_()
    answers.start_()
    job = None if keep is None else _open_job(made, c, keep, source, outer)
    del outer
    try:
        made.progress.begin(c.label, plan.blocks)
        committer = Committer(job, compressor, plan.blocks + 1, made.progress, resumable=False)
        compress_all(compressor, [judges, committer], made.calibration(c.method), check_stop=check_stop, progress=made.progress)
        seconds = time.perf_counter() - started - judges.seconds
        seconds_cpu = time.process_time() - cpu - judges.cpu_seconds
        # A stage of its own: a window takes another time than a block, and the end is foretold from the units that are done.
        made.progress.begin(f"{c.label}, judged", sum(len(w) for w in made.texts.values()) + count_batches(answers.tasks))
        note = noting(made, check_stop)
        figures = distances((made.model, cached.states()), (model, texts.states), made.texts, note)
        answered = answers.accuracies(note)
        measured = time.perf_counter() - started - seconds
        if job is not None:
            job.settle()
            _publish(made, job, c, check_stop, Clock(started, seconds, model.device))
    finally:
        if job is not None:
            job.close()
        if c.method.rotate is not None:
            model.drop_outer_()
    return {
        **_summary(c.method, plan, committer.rows),
        **_learned(committer.tuned),
        "kl_mean": _mean_kl(figures),
        "kl_ci95": _mean_width(figures),
        "texts": figures,
        "seconds_pressing": round(seconds, 2),
        "seconds_pressing_cpu": round(seconds_cpu, 2),
        "seconds_measuring": round(measured, 2),
        "seconds_capture": _seconds_of_capture(made, cached, c.method),
        "answers": answered,
    }


def _learned(spans: Sequence[TunedSpan]) -> dict[str, Any]:
    """Return mean losses of what was learned, on calibration text at the first and the last steps and on held-out text: what is overfitted."""
    if not spans:
        return {}
    run = [span.calibration for span in spans if span.calibration]
    return {
        "learned": {
            "spans": len(spans),
            "kept": sum(span.kept for span in spans),
            "failed": [f"{span.name}: {span.failed}" for span in spans if span.failed is not None],
            "calibration_first": _mean([losses[0] for losses in run]),
            "calibration_last": _mean([losses[-1] for losses in run]),
            "held_out_before": _mean([span.before for span in spans]),
            "held_out_after": _mean([span.after for span in spans]),
            "seconds": round(math.fsum(span.seconds for span in spans), 2),
        }
    }


def _publish(made: Comparison, job: Job, c: Variant, check_stop: Callable[[], None], clock: Clock) -> None:
    run = Run(made.path, *made.opened(c.method), c.method, made.plans[c], made.calibration(c.method))
    finish_job(job, run, Proof(tokens=0), made.progress, check_stop, clock)


def _summary(method: Method, plan: Plan, rows: Sequence[LayerRow]) -> dict[str, Any]:
    """Sum the layers' rows up. Raises NumericsError where their mean error is not finite."""
    error = _mean([row.error for row in rows])
    if not math.isfinite(error):
        raise NumericsError("the error of the layers is beyond the range of numbers.")
    fallbacks = [text for row in rows for text in row.fallbacks]
    nbytes, weights = sum(row.bytes for row in rows), sum(w.weights for w in plan.weights)
    return {
        "weights": told_weights(method.resolved()),
        **({"formats": plan.by_format()} if method.options else {}),
        "bits_per_weight": nbytes * 8 / weights,
        "bytes": nbytes,
        "error": error,
        "error_rounded": _mean([row.error_rounded for row in rows]),
        "measured_on": "weight" if any(row.measured_on == "weight" for row in rows) else "output",
        "inputs": method.recipe.calibration.inputs if method.follows_text else None,
        "fallbacks": len(fallbacks),
        "first_fallback": fallbacks[0] if fallbacks else None,
    }


def _seconds_of_capture(made: Comparison, captured: StatisticsCache, method: Method) -> float | None:
    """What the pass over the original took that a recipe takes its statistics from; a pass of its own is in its quantizing."""
    if not method.follows_text or not made.shares(method):
        return 0.0
    return None if captured.seconds is None else round(captured.seconds, 2)


def _folder(out: Path, c: Variant) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in c.name)
    return out / "models" / (name if c.bits is None else f"{name}-{c.bits}")


def _identity(made: Comparison, c: Variant, source: Mapping[str, str]) -> dict[str, Any]:
    samples = made.calibration(c.method)
    return identify(source, None if samples is None else samples.sha256, c.method, made.model.device)


def _is_kept(made: Comparison, c: Variant, out: Path, source: Mapping[str, str]) -> bool:
    manifest = _folder(out, c) / MANIFEST_NAME
    try:
        known = read_json(manifest) if manifest.exists() else None
    except CheckpointError:
        return False
    return isinstance(known, dict) and known.get("job") == _identity(made, c, source)


def _open_job(made: Comparison, c: Variant, out: Path, source: Mapping[str, str], outer: dict[str, torch.Tensor]) -> Job:
    folder = _folder(out, c)
    if folder.exists():
        shutil.rmtree(folder)  # of a recipe that has changed, or of a run that was stopped
    job = Job.open(folder, _identity(made, c, source))
    total = len(made.model.blocks) + 1
    job.commit("outer", shard_name(0, total), outer, BlockRecord().dump(), None)
    return job


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)


def _mean_kl(texts: Mapping[str, Mapping[str, Any]]) -> float:
    return _mean([figures["kl_mean"] for figures in texts.values()])


def _mean_width(texts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Half the 95 % interval of the mean over texts, which are independent."""
    widths = [figures["kl_ci95"] for figures in texts.values()]
    return None if None in widths else math.sqrt(math.fsum(w * w for w in widths)) / len(widths)
