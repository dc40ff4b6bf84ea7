"""What the recipes of a comparison share while they run: the model, the texts, the pass over the original, and how a row is known."""

import datetime
import functools
import hashlib
import inspect
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration import Samples, of_origin
from bitpress.comparison.statistics_cache import StatisticsCache, capture_original
from bitpress.comparison.variants import Variant
from bitpress.errors import BitpressError, DiskError, JobStopped
from bitpress.evaluation import QuestionSet
from bitpress.memory import peak_bytes, release, reset_peak
from bitpress.models.opening import OriginalLoader, open_original
from bitpress.models.streaming import StreamedModel
from bitpress.models.walk import LoadedBlock, Visitor
from bitpress.pipeline.blocks import BlockCompressor
from bitpress.pipeline.budget import measure_offer, settle_plan
from bitpress.pipeline.calibration_stream import CalibrationStream, Measured
from bitpress.pipeline.gradients import measure_gradients
from bitpress.pipeline.identity import recorded
from bitpress.pipeline.offer import trial_parts
from bitpress.pipeline.plan import Plan
from bitpress.progress import Progress
from bitpress.recipes import Calibration, Method, Recipe
from bitpress.transforms.rotate import Rotate

__all__ = [
    "Comparison",
    "Timed",
    "attempt",
    "capture",
    "drawn",
    "known_of",
    "make_compressor",
    "noting",
    "settled_plan",
]

# A method that is being written may break in any of these ways; the other recipes are not to suffer from that.
FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


@dataclass
class Comparison:
    """What all recipes share while they run; `figures` are those that budgets of the same formats choose by."""

    path: Path
    model: StreamedModel
    loader: OriginalLoader
    texts: dict[str, torch.Tensor]
    hashes: dict[str, str]
    shared: Calibration
    samples: dict[Calibration, Samples]
    tasks: dict[str, QuestionSet]
    plans: dict[Variant, Plan]
    progress: Progress
    figures: dict[object, dict[str, Float[torch.Tensor, " figures"]]] = field(default_factory=dict)
    rotated: dict[Rotate, tuple[StreamedModel, OriginalLoader]] = field(default_factory=dict)

    def opened(self, method: Method) -> tuple[StreamedModel, OriginalLoader]:
        """Return the model that a method compresses: the original, or that in another basis."""
        if method.rotate is None:
            return self.model, self.loader
        if method.rotate not in self.rotated:
            self.rotated[method.rotate] = open_original(self.path, self.model.dtype, method.rotate, device=self.model.device)
        return self.rotated[method.rotate]

    def calibration(self, method: Method) -> Samples | None:
        return self.samples[drawn(method.recipe.calibration)] if method.reads_text else None

    def shares(self, method: Method) -> bool:
        """Whether the pass over the original serves a method: it calibrates just so, or needs nothing. In another basis nothing does."""
        recipe = method.recipe
        if method.rotate is not None or method.observes or method.tunings:
            return False
        alike = recipe.calibration.model_copy(update={"gram": self.shared.gram})
        return not method.needs or (alike == self.shared and recipe.batch == _batch())

    def needs(self) -> frozenset[str]:
        """Statistics to collect of the original; with any, the gram, by which every recipe's error is told."""
        found: frozenset[str] = frozenset().union(*(c.method.needs for c in self.plans if self.shares(c.method)))
        return found | {"gram"} if found else found


@dataclass
class Timed:
    """Visitors that look at compressed blocks, as one, and the time that takes: on the clock, and of all threads together."""

    visitors: Sequence[Visitor]
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def visit_(self, block: LoadedBlock) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        for visitor in self.visitors:
            visitor.visit_(block)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu


def capture(made: Comparison, where: Path, identity: Mapping[str, Any], check_stop: Callable[[], None]) -> StatisticsCache:
    needs = made.needs()
    samples = made.samples[drawn(made.shared)] if needs else None
    wanted = {**identity, "calibration": None if samples is None else samples.sha256, "batch": _batch()}
    inputs = None if samples is None else samples.inputs
    return capture_original(where, wanted, made.model, made.texts, inputs, needs, _batch(), check_stop, made.progress)


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
        for model in (made.model, *(model for model, _ in made.rotated.values())):
            for i in range(len(model.blocks)):
                model.drop_block_(i)
        release()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"failed": None, **found, "peak_memory_bytes": peak_bytes(), "threads": torch.get_num_threads(), "finished": now}


def settled_plan(made: Comparison, c: Variant, check_stop: Callable[[], None]) -> Plan:
    """Return the plan of a variant, with the formats that its budget buys: measured once for the same formats and calibration."""
    plan = made.plans[c]
    if plan.offer is None:
        return plan
    samples = made.calibration(c.method)
    assert samples is not None
    offered = tuple((own[0].parameter.stem, *(repr(trial_parts(w)) for w in own)) for own in plan.offer.free)
    key = (drawn(c.recipe.calibration), c.method.rotate, offered)
    model, loader = made.opened(c.method)
    if key not in made.figures:
        made.figures[key] = measure_offer(model, plan.offer, samples.inputs, check_stop, made.progress)
    stored = loader.stored_bytes(model.model.state_dict())
    made.plans[c] = settle_plan(plan, model, c.method, stored, made.figures[key])
    return made.plans[c]


def make_compressor(made: Comparison, cached: StatisticsCache, c: Variant, check_stop: Callable[[], None]) -> BlockCompressor:
    """Make a compressor that takes what the pass over the original has measured, or where that does not serve, runs its own samples."""
    model, plan, method = made.opened(c.method)[0], settled_plan(made, c, check_stop), c.method
    felt = of_origin(method.needs, "loss")
    samples = made.calibration(method)
    gradients: Mapping[str, torch.Tensor] | None = None
    if felt and method.rotate is None and felt <= cached.needs and samples is made.samples.get(drawn(made.shared)):
        gradients = cached.gradients
    elif felt and samples is not None:
        gradients = measure_gradients(model, plan.by_block(), samples.inputs, felt, check_stop, made.progress)
    stream = CalibrationStream(
        model,
        method.needs,
        batch=method.recipe.batch,
        follows_original=method.recipe.calibration.inputs == "original",
        gradients=gradients,
        check_stop=check_stop,
        keeps_original=method.keeps_original,
    )
    measured: Callable[[int], Measured] | None = None
    if made.shares(method) and cached.needs:
        shared = made.samples[drawn(made.shared)].inputs
        stream.embed_probe_(shared)  # the model learns what it passes to its blocks for inputs of the probe's shape
        measured = functools.partial(cached.measured, needs=method.needs)
    else:
        if method.rotate is not None and method.needs:
            made.progress.note(f"{c.label}: calibrates by itself, as statistics of the original are in another basis")
        inputs = samples if method.follows_text else None
        held_out = inputs.held_out if inputs is not None and method.tunings else None
        stream.start_(None if inputs is None else inputs.inputs, None, held_out=held_out)
    return BlockCompressor(stream, method, plan.weights, measured=measured, looked_at=True, progress=made.progress)


def known_of(made: Comparison, c: Variant, *, failed: bool = False) -> dict[str, Any]:
    """What a row says of the recipe that it is about; one that failed is found by its name alone, as it is done again."""
    known: dict[str, Any] = {"kind": "recipe", "name": c.name, "bits": c.bits}
    if failed:
        return known
    samples = made.calibration(c.method)
    calibration = None if samples is None else samples.sha256
    return {**known, "recipe": recorded(c.method), "code": _code(c.method), "calibration": calibration, "failed": None}


def _code(method: Method) -> str:
    """Hash the files of the recipe's own parts: a method that has been worked on is measured again."""
    digest = hashlib.sha256()
    quantizers = [named for named in method.every_part if named.kind == "quantizer"]
    for named in (*quantizers, *(named for named in method.parts if named.kind != "quantizer")):
        source = inspect.getsourcefile(type(named.part))
        digest.update(b"" if source is None else Path(source).read_bytes())
    for inputs in method.every_input:
        if inputs.observer is not None:
            digest.update(Path(inspect.getfile(type(inputs.observer.part))).read_bytes())
    return digest.hexdigest()[:16]


def noting(made: Comparison, check_stop: Callable[[], None]) -> Callable[[str], None]:
    def note(unit: str) -> None:
        made.progress.advance(unit)
        check_stop()

    return note


def drawn(calibration: Calibration) -> Calibration:
    """Leave out what does not decide which samples are drawn."""
    return calibration.model_copy(update={"inputs": "pressed", "gram": "input"})


def _batch() -> int:
    return int(Recipe.model_fields["batch"].default)
