"""What passes over the uncompressed model leave on disk, for any number of recipes to use.

The first unit of the job holds the states of the held-out texts after the last block, and whatever is measured before the first block;
then every block's statistics are a unit. A run that is stopped goes on from the last one.
"""

import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration import STATISTICS, Stats, of_origin
from bitpress.checkpoints.compressed import JOB_DIRECTORY
from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.safetensors_file import read_header, read_tensor
from bitpress.errors import CheckpointError
from bitpress.measure.evaluation_text import EvaluationText
from bitpress.models.linears import list_weights
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.models.walk import LoadedBlock, walk
from bitpress.pipeline.calibration_stream import CalibrationStream, Measured, StatisticsVisitor
from bitpress.pipeline.gradients import measure_gradients
from bitpress.pipeline.journal import Job
from bitpress.pipeline.units import Work
from bitpress.progress import Progress

__all__ = ["StatisticsCache", "capture_original"]

GRADIENTS = "gradients.safetensors"


class StatisticsCache:
    """A finished pass; `needs` names the statistics that were asked for. The directory is locked until `close`."""

    def __init__(self, job: Job, needs: frozenset[str], names: Sequence[str]) -> None:
        self.job, self.needs, self._names = job, needs, names

    def states(self) -> dict[str, Float[torch.Tensor, "samples positions hidden"]]:
        """Return every text's states after the last block."""
        read = self._reader(0)
        return {name: read(f"text{k}") for k, name in enumerate(self._names)}

    def measured(self, i: int, needs: Collection[str]) -> Measured:
        """Return what calibration saw of a block: the statistics named, and the gram."""
        facts, read = self.job.units[i + 1].facts, self._reader(i + 1)
        tensors: dict[str, torch.Tensor] = {}
        stats = {}
        for weight, entry in facts["stats"].items():
            held = {}
            for kind, key in entry["held"].items():
                if kind in needs or kind == "gram":
                    if key not in tensors:  # weights that share an input share its statistics
                        tensors[key] = read(key)
                    held[kind] = tensors[key]
            stats[weight] = Stats.named(entry["tokens"], held)
        return Measured(stats, facts["groups"], read("probe"))

    @property
    def seconds(self) -> float | None:
        """What collecting the statistics took; None where an earlier version did it."""
        if any(unit.facts.get("seconds") is None for unit in self.job.units):
            return None
        return math.fsum(unit.facts["seconds"] for unit in self.job.units)

    @property
    def gradients(self) -> Mapping[str, torch.Tensor]:
        return self.job.kept(GRADIENTS)

    def close(self) -> None:
        self.job.close()

    def _reader(self, unit: int) -> Callable[[str], torch.Tensor]:
        path = self.job.root / "objects" / self.job.units[unit].shard
        entries, _ = read_header(path)
        return lambda name: read_tensor(path, entries[name])


def capture_original(
    where: Path,
    identity: Mapping[str, Any],
    model: StreamedModel,
    texts: Mapping[str, Inputs],
    calibration: Inputs | None,
    needs: Collection[str],
    batch: int,
    check_stop: Callable[[], None],
    progress: Progress,
) -> StatisticsCache:
    """Run the texts, and the calibration samples where statistics are needed, through the uncompressed model.

    What is in `where` already is used if it is of the same identity and has the statistics; else it is made anew. `batch` samples
    go through a block together. The model's outer parts must be loaded. Raises what capturing and a job raise.
    """
    wanted = {**identity, "needs": sorted(needs)}
    there = _begun(where)
    job = Job.open(where, there if there is not None and _serves(there, wanted) else wanted, force=True)
    try:
        collected = frozenset(map(str, job.identity["needs"]))
        if not job.units:
            _first_unit(job, model, texts, calibration, collected, check_stop, progress)
        if calibration is not None:
            _block_units(job, model, calibration, collected, batch, check_stop, progress)
    except BaseException:
        job.close()
        raise
    return StatisticsCache(job, frozenset(needs), list(texts))


def forget(where: Path) -> None:
    """Remove a capture."""
    if where.is_dir() and (where / JOB_DIRECTORY).is_dir():
        shutil.rmtree(where)


def _begun(where: Path) -> dict[str, Any] | None:
    """Return the identity of the pass that has been begun in a directory, if there is one."""
    path = where / JOB_DIRECTORY / "job.json"
    try:
        known = read_json(path) if path.exists() else None
    except CheckpointError:
        return None
    return known if isinstance(known, dict) and isinstance(known.get("needs"), list) else None


def _serves(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a pass has what is wanted; where that is no statistics, whatever it calibrated on."""
    apart = {"needs"} if wanted["needs"] else {"needs", "calibration", "batch"}
    same = all(there.get(key) == wanted.get(key) for key in {*there, *wanted} - apart)
    return same and set(wanted["needs"]) <= set(there["needs"]) <= set(STATISTICS)


def _first_unit(
    job: Job,
    model: StreamedModel,
    texts: Mapping[str, torch.Tensor],
    calibration: torch.Tensor | None,
    needs: frozenset[str],
    check_stop: Callable[[], None],
    progress: Progress,
) -> None:
    kept, started, seconds = None, time.perf_counter(), 0.0
    if of_origin(needs, "loss") and calibration is not None:
        weights = [list_weights(model, i, ())[0] for i in range(len(model.blocks))]
        kept = job.keep(GRADIENTS, measure_gradients(model, weights, calibration, needs, check_stop, progress))
        seconds = time.perf_counter() - started
    evaluated = EvaluationText(model, texts)
    evaluated.start_()
    progress.begin("original on the evaluation texts", len(model.blocks))
    walk(model, [evaluated], check_stop=check_stop, note=progress.advance)
    states = {f"text{k}": value for k, value in enumerate(evaluated.states.values())}
    facts = {"seconds": seconds} | ({} if kept is None else {"kept": kept})
    job.commit("texts", "texts.safetensors", states, facts, None)


def _block_units(
    job: Job,
    model: StreamedModel,
    calibration: torch.Tensor,
    needs: frozenset[str],
    batch: int,
    check_stop: Callable[[], None],
    progress: Progress,
) -> None:
    total, done = len(model.blocks), len(job.units) - 1
    if done == total:
        return
    stream = CalibrationStream(
        model,
        needs,
        batch=batch,
        follows_original=True,
        gradients=job.kept(GRADIENTS) if of_origin(needs, "loss") else None,
        check_stop=check_stop,
        before_advance=job.settle,
    )
    stream.start_(calibration, job.activations())
    progress.begin("statistics of the original", total, done)
    collected = StatisticsVisitor(stream)
    walk(model, [collected, _Commit(job, collected)], first=done, check_stop=check_stop, note=progress.advance)
    job.settle()


class _Commit:
    """A visitor that hands the statistics of every block to the journal."""

    def __init__(self, job: Job, collected: StatisticsVisitor) -> None:
        self.job, self.collected = job, collected
        self._started = time.perf_counter()

    def visit_(self, block: LoadedBlock) -> None:
        found = self.collected.found
        assert found is not None
        tensors, facts = _packed(found)
        facts["seconds"] = time.perf_counter() - self._started
        shard = f"block-{block.index:05d}.safetensors"
        work = Work(block.name, shard, tensors, facts)
        self.job.commit_together_behind([work], None if block.last else self.collected.stream.state)
        self._started = time.perf_counter()


def _packed(found: Measured) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a block's tensors, each once, and what says whose they are."""
    tensors: dict[str, torch.Tensor] = {"probe": found.probe}
    names: dict[int, str] = {}
    facts: dict[str, Any] = {}
    for weight, stats in found.stats.items():
        held = {}
        for kind in STATISTICS:
            value: torch.Tensor | None = getattr(stats, kind)
            if value is not None:
                held[kind] = names.setdefault(id(value), f"{kind}{len(names)}")
                tensors[held[kind]] = value
        facts[weight] = {"tokens": stats.tokens, "held": held}
    return tensors, {"stats": facts, "groups": found.groups}
