"""Zero-shot accuracy in a comparison: of the original, and of the best recipes of every width.

The questions walk through the compressed blocks as these are made, as held-out texts do; nothing is written but a row for every task.
Which recipes are the best is known when all have been measured, so that they are quantized once more; those that are sure to be among
them answer the first time.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitpress.comparison.results import Results
from bitpress.comparison.session import Comparison, attempt, capture, known_of, make_compressor, noting
from bitpress.comparison.statistics_cache import StatisticsCache
from bitpress.comparison.variants import Variant
from bitpress.evaluation import hash_questions
from bitpress.measure.multiple_choice import Answers, count_batches
from bitpress.models.walk import walk

__all__ = ["choose_best", "keys_of", "measure_tasks", "sure_to_answer", "task_rows", "width_of"]

Row = Mapping[str, Any]


def width_of(row: Row) -> int:
    """Return the width that a recipe's row is grouped under: the one it was made for, or the whole bits that it stores."""
    return int(row["bits"] or max(math.floor(row["bits_per_weight"]), 1))


def choose_best(rows: Mapping[Variant, Row], best: int) -> list[Variant]:
    """Return the `best` recipes of every width by their KL, of those that did not fail; widths from the most bits down."""
    fine = sorted((c for c, row in rows.items() if not row["failed"]), key=lambda c: float(rows[c]["kl_mean"]))
    widths = sorted({width_of(rows[c]) for c in fine}, reverse=True)
    return [c for width in widths for c in [c for c in fine if width_of(rows[c]) == width][:best]]


def sure_to_answer(candidates: Sequence[Variant], best: int) -> frozenset[Variant]:
    """Return those that are among the `best` of their width whatever is measured, as there are no more."""
    if any(c.bits is None for c in candidates):
        return frozenset()  # its width is known when the model has been quantized, and may be anyone's
    count = Counter(c.bits for c in candidates)
    return frozenset(c for c in candidates if count[c.bits] <= best)


def keys_of(made: Comparison, c: Variant | None) -> dict[str, dict[str, Any]]:
    """Return what the rows of a recipe, or of the original, say for every task of what they are about."""
    known = {"name": None, "bits": None, "failed": None} if c is None else known_of(made, c)
    hashes = {name: hash_questions(task.questions) for name, task in made.tasks.items()}
    return {task: {**known, "kind": "tasks", "task": task, "documents_sha256": sha} for task, sha in hashes.items()}


def task_rows(keys: Mapping[str, Row], figures: Mapping[str, Row], found: Row) -> list[dict[str, Any]]:
    """Return the rows of tasks with their figures; `found` is what the quantizing that they came from says of itself."""
    shared = {key: found[key] for key in ("failed", "peak_memory_bytes", "threads", "finished")}
    return [{**keys[task], **shared, **told} for task, told in figures.items()]


def measure_tasks(
    made: Comparison,
    results: Results,
    chosen: Sequence[Variant],
    identity: Mapping[str, Any],
    check_stop: Callable[[], None],
    note_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return a row for every task and the original (its name is None), then every recipe chosen; measure what has none yet."""
    captured: StatisticsCache | None = None
    rows: list[dict[str, Any]] = []
    try:
        for c in (None, *chosen):
            keys = keys_of(made, c)
            pending = [task for task, key in keys.items() if results.find(key) is None]
            if pending:
                made.model.load_outer_()
                if c is not None and captured is None:
                    captured = capture(made, results.out / "capture", identity, check_stop)
                found = _answer(made, captured, c, pending, check_stop)
                figures = found.pop("tasks", {})
                for row in task_rows(keys, {task: figures.get(task, {}) for task in pending}, found):
                    results.add(row)
            for task, key in keys.items():
                named = {"kind": "tasks", "name": key["name"], "bits": key["bits"], "task": task}
                rows.append(results.find(key) or results.find(named) or {})
                note_row(rows[-1])
    finally:
        if captured is not None:
            captured.close()
    return rows


def _answer(
    made: Comparison, captured: StatisticsCache | None, c: Variant | None, tasks: Sequence[str], check_stop: Callable[[], None]
) -> dict[str, Any]:
    """Return what the rows of the original, or of a recipe that quantizes the model for it, say of some tasks."""
    model = made.model if c is None else made.opened(c.method)[0]
    rotated = model is not made.model
    answers = Answers(model, {name: made.tasks[name] for name in tasks})
    label = "original" if c is None else c.label

    def work() -> dict[str, Any]:
        if rotated:
            model.load_outer_()
        total = len(model.blocks)
        compressor = [] if c is None or captured is None else [make_compressor(made, captured, c, check_stop)]
        answers.start_()
        made.progress.begin(f"{label}: {', '.join(tasks)}", total)
        walk(model, [*compressor, answers], check_stop=check_stop, note=made.progress.advance)
        # A stage of its own: some questions take another time than a block, and the end is foretold from the units that are done.
        made.progress.begin(f"{label}, answering", count_batches(answers.tasks))
        return {"tasks": answers.accuracies(noting(made, check_stop))}

    try:
        return attempt(made, work)
    finally:
        if rotated:
            model.drop_outer_()
