"""A comparison: many recipes on one model, where everything but the recipe is the same.

Recipes that calibrate on the original's inputs share the statistics of one pass over it. Held-out texts walk through the compressed
blocks as these are made, so that a recipe costs its own work and the head; nothing is written but a row, unless models are kept.
"""

import datetime
import hashlib
import inspect
import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitpress.calibration import Windows, of_origin, read_texts
from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.pressed import MANIFEST_NAME
from bitpress.errors import BitpressError, CheckpointError, DiskError, JobStopped, NumericsError, UsageError
from bitpress.pipeline.candidate import Candidate
from bitpress.pipeline.captured import Captured, capture_original, forget
from bitpress.pipeline.heldout import Heldout, distances
from bitpress.pipeline.identity import identify, recorded, versions
from bitpress.pipeline.job import Job
from bitpress.pipeline.memory import peak_bytes, release, reset_peak
from bitpress.pipeline.plan import Plan, check_room, make_plan
from bitpress.pipeline.press import PressedBlock, Presser
from bitpress.pipeline.progress import Progress, Silent
from bitpress.pipeline.quantize import Proof, finish_job, shard_name
from bitpress.pipeline.rescale import PROBE_LENGTH
from bitpress.pipeline.results import Results
from bitpress.pipeline.sensitivity import measure_sensitivity
from bitpress.pipeline.source_model import OriginalLoader, open_original
from bitpress.pipeline.stopping import stoppable
from bitpress.pipeline.streaming import StreamedModel
from bitpress.pipeline.windows import calibration_windows, load_windows
from bitpress.recipes import Calibration, Recipe
from bitpress.runtime.skeleton import check_tokens

__all__ = ["HELDOUT", "compare_recipes"]

# Held-out texts of two kinds: one that the built-in calibration mix has too, one that it has not.
HELDOUT = {"speeches": "builtin:heldout:speeches", "reference": "builtin:heldout:reference"}
# Windows of every text on which the noise of the arithmetic is measured, against float32.
FLOOR_WINDOWS = 8
# A method that is being written may break in any of these ways; the other recipes are not to suffer from that.
FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


@dataclass
class _Comparison:
    """What all recipes share while they run."""

    path: Path
    model: StreamedModel
    loader: OriginalLoader
    texts: dict[str, torch.Tensor]
    hashes: dict[str, str]
    shared: Calibration
    windows: dict[Calibration, Windows]
    plans: dict[Candidate, Plan]
    progress: Progress
    outer: dict[str, torch.Tensor] = field(default_factory=dict)

    def tokens(self, recipe: Recipe) -> Windows | None:
        return self.windows[_drawn(recipe.calibration)] if recipe.needs() else None

    def shares(self, recipe: Recipe) -> bool:
        """Whether the pass over the original serves a recipe: it calibrates just so, or needs nothing."""
        return not recipe.needs() or (recipe.calibration == self.shared and recipe.batch == _batch())

    def needs(self) -> frozenset[str]:
        """Statistics to collect of the original; with any, the gram, by which every recipe's error is told."""
        found: frozenset[str] = frozenset().union(*(c.recipe.needs() for c in self.plans if self.shares(c.recipe)))
        return found | {"gram"} if found else found


def compare_recipes(
    path: Path,
    out: Path,
    candidates: Sequence[Candidate],
    texts: Mapping[str, str] = HELDOUT,
    *,
    shared: Calibration | None = None,
    tokens: int = 32768,
    length: int = 512,
    keep: bool = False,
    forget_capture: bool = False,
    progress: Progress | None = None,
    note_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure recipes on a model; give a row for each, and for the noise of the arithmetic.

    texts       held-out texts by name; `tokens` of each are taken in windows of `length`
    shared      the calibration of recipes that share one pass over the original
    keep        publish what every recipe makes in OUT/models
    note_row    hears every row: what is there already first, then each as soon as it is done

    The same call goes on after what is there. A recipe that fails has a row with `failed`, and the others are done. Raises what
    `quantize_directory` raises for what is wrong before the first recipe or with the directory, JobStopped on a signal.
    """
    progress = progress or Silent()
    Results.check_vacant(out)
    made = _prepare(path, candidates, texts, shared or Calibration(inputs="original"), tokens, length, progress)
    for candidate, plan in made.plans.items():
        if made.tokens(candidate.recipe) is not None or keep:
            check_room(plan, out, 0 if keep else plan.disk)
    dtype = "bf16" if made.model.dtype == torch.bfloat16 else "fp32"
    source = made.loader.source.hashes()
    identity = {"comparison": 1, "source": source, "texts": made.hashes, "compute": dtype, "versions": versions()}
    results = Results.open(out, identity)
    try:
        with stoppable() as check_stop:
            _run(made, results, candidates, identity, source, keep, check_stop, note_row)
        rows = [results.find(_known(made, c)) or results.find(_known(made, c, failed=True)) for c in candidates]
        if forget_capture and all(row is not None and not row["failed"] for row in rows):
            forget(out / "capture")
        return {
            "model": str(path),
            "compute": dtype,
            "texts": {name: {"source": texts[name], "tokens": w.numel()} for name, w in made.texts.items()},
            "floor": results.find({"kind": "floor"}),
            "rows": [row for row in rows if row is not None],
        }
    finally:
        results.close()


def _prepare(
    path: Path,
    candidates: Sequence[Candidate],
    texts: Mapping[str, str],
    shared: Calibration,
    tokens: int,
    length: int,
    progress: Progress,
) -> _Comparison:
    """Open, plan and read everything: whatever cannot work is said here, before anything is written."""
    if len({(c.name, c.bits) for c in candidates}) < len(candidates) or not candidates:
        raise UsageError("a comparison needs recipes, each with a name of its own.")
    if tokens < 2 or length < 2:
        raise UsageError(f"texts need 2 tokens or more in windows of 2 or more, got {tokens} and {length}.")
    for name, text in texts.items():
        read_texts(text)
        seen = next((c for c in candidates if c.recipe.needs() and c.recipe.calibration.text == text), None)
        if seen is not None:
            raise UsageError(
                f"{name}: {text} is the calibration text of {seen.name}; the distance needs a text that it never saw."
            )
    model, loader = open_original(path, candidates[0].recipe.compute_dtype())
    stored = loader.stored_bytes(model.model.state_dict())
    plans = {}
    for c in candidates:
        try:
            plans[c] = make_plan(model, c.recipe, stored)
        except BitpressError as error:
            raise type(error)(f"{c.label}: {error}") from error
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or length
    length = min(length, limit)
    drawn = {
        name: load_windows(text, path, samples=max(tokens // length, 1), length=length, seed=0) for name, text in texts.items()
    }
    for windows in drawn.values():
        check_tokens(windows.tokens, model.model.config, str(path))
    wanted = {_drawn(c.recipe.calibration) for c in candidates if c.recipe.needs()}
    calibration = {c: calibration_windows(c, path, model.model.config) for c in sorted(wanted, key=str)}
    heldout = {name: windows.tokens for name, windows in drawn.items()}
    hashes = {name: windows.sha256 for name, windows in drawn.items()}
    shared = shared.model_copy(update={"inputs": "original"})
    return _Comparison(path, model, loader, heldout, hashes, shared, calibration, plans, progress)


def _run(
    made: _Comparison,
    results: Results,
    candidates: Sequence[Candidate],
    identity: Mapping[str, Any],
    source: Mapping[str, str],
    keep: bool,
    check_stop: Callable[[], None],
    note_row: Callable[[dict[str, Any]], None],
) -> None:
    pending = []
    for c in candidates:
        known = results.find(_known(made, c))
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
    outer = made.model.load_outer_()
    made.outer = outer if keep else {}
    captured = _capture(made, results.out / "capture", identity, check_stop)
    try:
        if floor is None:
            results.add(_measure_floor(made, captured, check_stop))
        for c in pending:
            check_stop()
            row = _known(made, c) | _measure(made, captured, c, results.out if keep else None, source, check_stop)
            results.add(row)
            note_row(results.rows[-1])
    finally:
        captured.close()


def _capture(made: _Comparison, where: Path, identity: Mapping[str, Any], check_stop: Callable[[], None]) -> Captured:
    needs = made.needs()
    windows = made.windows[_drawn(made.shared)] if needs else None
    wanted = {**identity, "calibration": None if windows is None else windows.sha256, "batch": _batch()}
    recipe = Recipe(quantizer={"name": "rtn"}, calibration=made.shared)
    tokens = None if windows is None else windows.tokens
    return capture_original(where, wanted, made.model, made.texts, recipe, tokens, needs, check_stop, made.progress)


def _measure_floor(made: _Comparison, captured: Captured, check_stop: Callable[[], None]) -> dict[str, Any]:
    """Measure the original as it computes here against itself in float32, on some windows of every text."""
    texts = {name: windows[:FLOOR_WINDOWS] for name, windows in made.texts.items()}
    exact, _ = open_original(made.path, torch.float32)
    exact.load_outer_()
    heldout = Heldout(exact, texts)
    heldout.start_()
    made.progress.begin("noise of the arithmetic", len(exact.blocks) + sum(map(len, texts.values())))
    for i in range(len(exact.blocks)):
        check_stop()
        exact.load_block_(i)
        heldout.step_(i)
        exact.drop_block_(i)
        made.progress.advance(exact.block_name(i))
    states = {name: value[:FLOOR_WINDOWS] for name, value in captured.states().items()}
    figures = distances((exact, heldout.states), (made.model, states), texts, _noting(made, check_stop))
    return {"kind": "floor", "texts": figures, "tokens": sum(w.numel() for w in texts.values()), "kl_mean": _mean_kl(figures)}


def _measure(
    made: _Comparison,
    captured: Captured,
    c: Candidate,
    keep: Path | None,
    source: Mapping[str, str],
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Press and measure one recipe: what its row says beyond which recipe it is."""
    reset_peak()
    try:
        found = _press(made, captured, c, keep, source, check_stop)
    except (JobStopped, DiskError):
        raise
    except BitpressError as error:
        found = {"failed": str(error)}
    except FAILURES as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(str(error).split())[:300]
        found = {"failed": f"{type(error).__name__}: {what} ({Path(frame.filename).name}:{frame.lineno})"}
    finally:
        for i in range(len(made.model.blocks)):
            made.model.drop_block_(i)
        release()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"failed": None, **found, "peak_memory_bytes": peak_bytes(), "threads": torch.get_num_threads(), "finished": now}


def _press(
    made: _Comparison,
    captured: Captured,
    c: Candidate,
    keep: Path | None,
    source: Mapping[str, str],
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    started = time.perf_counter()
    model, plan, recipe = made.model, made.plans[c], c.recipe
    heldout = Heldout(model, made.texts)
    presser = _make_presser(made, captured, c, heldout, check_stop)
    heldout.start_()
    job = None if keep is None else _open_job(made, c, keep, source)
    try:
        windows = sum(len(w) for w in made.texts.values())
        made.progress.begin(c.label, plan.blocks + windows)
        rows: list[dict[str, Any]] = []
        for i in range(plan.blocks):
            check_stop()
            block = presser.press_(i, last=i == plan.blocks - 1)
            rows += block.rows
            if job is not None:
                _keep_block(job, made, plan, i, block)
            made.progress.advance(model.block_name(i), error=block.error)
        pressed = time.perf_counter() - started - heldout.seconds
        figures = distances((model, captured.states()), (model, heldout.states), made.texts, _noting(made, check_stop))
        measured = time.perf_counter() - started - pressed
        if job is not None:
            job.settle()
            clock = (started, pressed)
            finish_job(
                job,
                made.loader,
                made.path,
                plan,
                recipe,
                made.tokens(recipe),
                Proof(tokens=0),
                made.progress,
                check_stop,
                clock,
            )
    finally:
        if job is not None:
            job.close()
    error = _mean([row["error"] for row in rows])
    if not math.isfinite(error):
        raise NumericsError("the error of the layers is beyond the range of numbers.")
    fallbacks = [text for row in rows for text in row["fallbacks"]]
    nbytes, weights = sum(row["bytes"] for row in rows), sum(w.weights for w in plan.weights)
    return {
        "weights": recipe.resolved()["weights"],
        "bits_per_weight": nbytes * 8 / weights,
        "bytes": nbytes,
        "kl_mean": _mean_kl(figures),
        "kl_ci95": _mean_width(figures),
        "texts": figures,
        "error": error,
        "error_rounded": _mean([row["error_rounded"] for row in rows]),
        "measured_on": "weight" if any(row["measured_on"] == "weight" for row in rows) else "output",
        "inputs": recipe.calibration.inputs if recipe.needs() else None,
        "seconds_pressing": round(pressed, 2),
        "seconds_measuring": round(measured, 2),
        "fallbacks": len(fallbacks),
        "first_fallback": fallbacks[0] if fallbacks else None,
    }


def _noting(made: _Comparison, check_stop: Callable[[], None]) -> Callable[[str], None]:
    def note(unit: str) -> None:
        made.progress.advance(unit)
        check_stop()

    return note


def _make_presser(
    made: _Comparison, captured: Captured, c: Candidate, heldout: Heldout, check_stop: Callable[[], None]
) -> Presser:
    """Make a presser that takes what the pass over the original has seen, or where that is not for this recipe runs its own windows."""
    model, plan, recipe = made.model, made.plans[c], c.recipe
    needs = recipe.needs()
    felt = of_origin(needs, "loss")
    windows = made.tokens(recipe)
    sensitivity = None
    if felt and felt <= captured.needs and windows is made.windows.get(_drawn(made.shared)):
        sensitivity = captured.sensitivity
    elif felt and windows is not None:
        sensitivity = measure_sensitivity(model, plan.weights, windows.tokens, check_stop, made.progress).__getitem__
    if made.shares(recipe) and captured.needs:
        shared = made.windows[_drawn(made.shared)].tokens
        model.embed(shared[:1, :PROBE_LENGTH])  # the model learns what it passes to its blocks for inputs of the probe's shape

        def measured(i: int) -> Any:
            return captured.measured(i, needs)

        return Presser(
            model, recipe, plan.weights, check_stop=check_stop, sensitivity=sensitivity, measured=measured, visit=heldout.step_
        )
    presser = Presser(model, recipe, plan.weights, check_stop=check_stop, sensitivity=sensitivity, visit=heldout.step_)
    presser.start_(None if windows is None else windows.tokens, None)
    return presser


def _known(made: _Comparison, c: Candidate, *, failed: bool = False) -> dict[str, Any]:
    """What a row says of the recipe that it is about; one that failed is found by its name alone, as it is done again."""
    known: dict[str, Any] = {"kind": "recipe", "name": c.name, "bits": c.bits}
    if failed:
        return known
    windows = made.tokens(c.recipe)
    calibration = None if windows is None else windows.sha256
    return {**known, "recipe": recorded(c.recipe), "code": _code(c.recipe), "calibration": calibration, "failed": None}


def _code(recipe: Recipe) -> str:
    """Hash the files of the recipe's own parts: a method that has been worked on is measured again."""
    parts = [recipe.make_quantizer(), *(part for _, part in (*recipe.make_transforms(), *recipe.make_corrections()))]
    digest = hashlib.sha256()
    for part in parts:
        source = inspect.getsourcefile(type(part))
        digest.update(b"" if source is None else Path(source).read_bytes())
    return digest.hexdigest()[:16]


def _folder(out: Path, c: Candidate) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in c.name)
    return out / "models" / (name if c.bits is None else f"{name}-{c.bits}")


def _identity(made: _Comparison, c: Candidate, source: Mapping[str, str]) -> dict[str, Any]:
    windows = made.tokens(c.recipe)
    return identify(source, None if windows is None else windows.sha256, c.recipe)


def _is_kept(made: _Comparison, c: Candidate, out: Path, source: Mapping[str, str]) -> bool:
    manifest = _folder(out, c) / MANIFEST_NAME
    try:
        known = read_json(manifest) if manifest.exists() else None
    except CheckpointError:
        return False
    return isinstance(known, dict) and known.get("job") == _identity(made, c, source)


def _open_job(made: _Comparison, c: Candidate, out: Path, source: Mapping[str, str]) -> Job:
    folder = _folder(out, c)
    if folder.exists():
        shutil.rmtree(folder)  # of a recipe that has changed, or of a run that was stopped
    job = Job.open(folder, _identity(made, c, source))
    total = len(made.model.blocks) + 1
    job.commit("outer", shard_name(0, total), made.outer, {"weights": {}, "digests": {}, "rows": []}, None)
    return job


def _keep_block(job: Job, made: _Comparison, plan: Plan, i: int, block: PressedBlock) -> None:
    job.commit_behind(made.model.block_name(i), shard_name(i + 1, plan.blocks + 1), block.tensors, block.facts(), None)


def _drawn(calibration: Calibration) -> Calibration:
    """Leave out what does not decide which windows are drawn."""
    return calibration.model_copy(update={"inputs": "pressed"})


def _batch() -> int:
    return int(Recipe.model_fields["batch"].default)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)


def _mean_kl(texts: Mapping[str, Mapping[str, Any]]) -> float:
    return _mean([figures["kl_mean"] for figures in texts.values()])


def _mean_width(texts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Half the 95 % interval of the mean over texts, which are independent."""
    widths = [figures["kl_ci95"] for figures in texts.values()]
    return None if None in widths else math.sqrt(math.fsum(w * w for w in widths)) / len(widths)
