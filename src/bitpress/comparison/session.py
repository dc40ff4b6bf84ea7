"""What the recipes of a comparison share while they run: the model, the texts, the pass over the original, and how a row is known."""

import datetime
import hashlib
import inspect
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitpress.calibration import Windows, of_origin
from bitpress.comparison.statistics_cache import StatisticsCache, capture_original
from bitpress.comparison.variants import Variant
from bitpress.errors import BitpressError, DiskError, JobStopped
from bitpress.evaluation import Task
from bitpress.memory import peak_bytes, release, reset_peak
from bitpress.models.opening import OriginalLoader
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.blocks import Presser
from bitpress.pipeline.channel_scaling import PROBE_LENGTH
from bitpress.pipeline.identity import recorded
from bitpress.pipeline.plan import Plan
from bitpress.pipeline.sensitivity import measure_sensitivity
from bitpress.progress import Progress
from bitpress.recipes import Calibration, Recipe

__all__ = ["Comparison", "Walks", "attempt", "capture", "drawn", "known_of", "make_presser", "noting"]

# A method that is being written may break in any of these ways; the other recipes are not to suffer from that.
FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


@dataclass
class Comparison:
    """What all recipes share while they run."""

    path: Path
    model: StreamedModel
    loader: OriginalLoader
    texts: dict[str, torch.Tensor]
    hashes: dict[str, str]
    shared: Calibration
    windows: dict[Calibration, Windows]
    tasks: dict[str, Task]
    plans: dict[Variant, Plan]
    progress: Progress
    outer: dict[str, torch.Tensor] = field(default_factory=dict)

    def tokens(self, recipe: Recipe) -> Windows | None:
        return self.windows[drawn(recipe.calibration)] if recipe.needs() else None

    def shares(self, recipe: Recipe) -> bool:
        """Whether the pass over the original serves a recipe: it calibrates just so, or needs nothing."""
        return not recipe.needs() or (recipe.calibration == self.shared and recipe.batch == _batch())

    def needs(self) -> frozenset[str]:
        """Statistics to collect of the original; with any, the gram, by which every recipe's error is told."""
        found: frozenset[str] = frozenset().union(*(c.recipe.needs() for c in self.plans if self.shares(c.recipe)))
        return found | {"gram"} if found else found


@dataclass
class Walks:
    """What walks through a model while its blocks are made, and the time that takes: on the clock, and of all threads together."""

    steps: Sequence[Callable[[int], None]]
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def step_(self, i: int) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        for step_ in self.steps:
            step_(i)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu


def capture(made: Comparison, where: Path, identity: Mapping[str, Any], check_stop: Callable[[], None]) -> StatisticsCache:
    needs = made.needs()
    windows = made.windows[drawn(made.shared)] if needs else None
    wanted = {**identity, "calibration": None if windows is None else windows.sha256, "batch": _batch()}
    recipe = Recipe(quantizer={"name": "rtn"}, calibration=made.shared)
    tokens = None if windows is None else windows.tokens
    return capture_original(where, wanted, made.model, made.texts, recipe, tokens, needs, check_stop, made.progress)


def attempt(made: Comparison, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do what a row is about, and give what it says beyond which recipe it is; `failed` with the reason where that breaks."""
    reset_peak()
    try:
        found = work()
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


def make_presser(
    made: Comparison, captured: StatisticsCache, c: Variant, visit: Callable[[int], None], check_stop: Callable[[], None]
) -> Presser:
    """Make a presser that takes what the pass over the original has seen, or where that is not for this recipe runs its own windows."""
    model, plan, recipe = made.model, made.plans[c], c.recipe
    needs = recipe.needs()
    felt = of_origin(needs, "loss")
    windows = made.tokens(recipe)
    sensitivity = None
    if felt and felt <= captured.needs and windows is made.windows.get(drawn(made.shared)):
        sensitivity = captured.sensitivity
    elif felt and windows is not None:
        sensitivity = measure_sensitivity(model, plan.weights, windows.tokens, check_stop, made.progress).__getitem__
    if made.shares(recipe) and captured.needs:
        shared = made.windows[drawn(made.shared)].tokens
        model.embed(shared[:1, :PROBE_LENGTH])  # the model learns what it passes to its blocks for inputs of the probe's shape

        def measured(i: int) -> Any:
            return captured.measured(i, needs)

        return Presser(
            model, recipe, plan.weights, check_stop=check_stop, sensitivity=sensitivity, measured=measured, visit=visit
        )
    presser = Presser(model, recipe, plan.weights, check_stop=check_stop, sensitivity=sensitivity, visit=visit)
    presser.start_(None if windows is None else windows.tokens, None)
    return presser


def known_of(made: Comparison, c: Variant, *, failed: bool = False) -> dict[str, Any]:
    """What a row says of the recipe that it is about; one that failed is found by its name alone, as it is done again."""
    known: dict[str, Any] = {"kind": "recipe", "name": c.name, "bits": c.bits}
    if failed:
        return known
    windows = made.tokens(c.recipe)
    calibration = None if windows is None else windows.sha256
    return {**known, "recipe": recorded(c.recipe), "code": _code(c.recipe), "calibration": calibration, "failed": None}


def _code(recipe: Recipe) -> str:
    """Hash the files of the recipe's own parts: a method that has been worked on is measured again."""
    parts = [*recipe.make_quantizers(), *(part for _, part in (*recipe.make_transforms(), *recipe.make_corrections()))]
    digest = hashlib.sha256()
    for part in parts:
        source = inspect.getsourcefile(type(part))
        digest.update(b"" if source is None else Path(source).read_bytes())
    return digest.hexdigest()[:16]


def noting(made: Comparison, check_stop: Callable[[], None]) -> Callable[[str], None]:
    def note(unit: str) -> None:
        made.progress.advance(unit)
        check_stop()

    return note


def drawn(calibration: Calibration) -> Calibration:
    """Leave out what does not decide which windows are drawn."""
    return calibration.model_copy(update={"inputs": "pressed"})


def _batch() -> int:
    return int(Recipe.model_fields["batch"].default)
