"""Zero-shot accuracy in a comparison: of the original, and of the best recipes of every width, which are pressed once more for it.

The questions walk through the compressed blocks as these are made, as held-out texts do; nothing is written but a row for every task.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitpress.evaluation import hash_questions
from bitpress.pipeline.answers import Answers, count_batches
from bitpress.pipeline.candidate import Candidate
from bitpress.pipeline.captured import Captured
from bitpress.pipeline.comparison import Comparison, attempt, capture, known_of, make_presser, noting
from bitpress.pipeline.results import Results

__all__ = ["choose_best", "measure_tasks", "width_of"]

Row = Mapping[str, Any]


def width_of(row: Row) -> int:
    """Give the width that a recipe's row is grouped under: the one it was made for, or the whole bits that it stores."""
    return int(row["bits"] or max(math.floor(row["bits_per_weight"]), 1))


def choose_best(rows: Mapping[Candidate, Row], best: int) -> list[Candidate]:
    """Give the `best` recipes of every width by their KL, of those that did not fail; widths from the most bits down."""
    fine = sorted((c for c, row in rows.items() if not row["failed"]), key=lambda c: float(rows[c]["kl_mean"]))
    widths = sorted({width_of(rows[c]) for c in fine}, reverse=True)
    return [c for width in widths for c in [c for c in fine if width_of(rows[c]) == width][:best]]


def measure_tasks(
    made: Comparison,
    results: Results,
    chosen: Sequence[Candidate],
    identity: Mapping[str, Any],
    check_stop: Callable[[], None],
    note_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Give a row for every task and the original (its name is None), then every recipe chosen; measure what has none yet."""
    hashes = {name: hash_questions(task.questions) for name, task in made.tasks.items()}
    captured: Captured | None = None
    rows: list[dict[str, Any]] = []
    try:
        for c in (None, *chosen):
            known = {"name": None, "bits": None, "failed": None} if c is None else known_of(made, c)
            keys = {task: {**known, "kind": "tasks", "task": task, "documents_sha256": sha} for task, sha in hashes.items()}
            pending = [task for task, key in keys.items() if results.find(key) is None]
            if pending:
                made.model.load_outer_()
                if c is not None and captured is None:
                    captured = capture(made, results.out / "capture", identity, check_stop)
                found = _answer(made, captured, c, pending, check_stop)
                figures = found.pop("tasks", {})
                for task in pending:
                    results.add({**keys[task], **found, **figures.get(task, {})})
            for task, key in keys.items():
                named = {"kind": "tasks", "name": key["name"], "bits": key["bits"], "task": task}
                rows.append(results.find(key) or results.find(named) or {})
                note_row(rows[-1])
    finally:
        if captured is not None:
            captured.close()
    return rows


def _answer(
    made: Comparison, captured: Captured | None, c: Candidate | None, tasks: Sequence[str], check_stop: Callable[[], None]
) -> dict[str, Any]:
    """Give what the rows of the original, or of a recipe that is pressed for it, say of some tasks."""
    model, started = made.model, time.perf_counter()
    answers = Answers(model, {name: made.tasks[name] for name in tasks})
    label = "original" if c is None else c.label

    def work() -> dict[str, Any]:
        total = len(model.blocks)
        presser = None if c is None or captured is None else make_presser(made, captured, c, answers.step_, check_stop)
        answers.start_()
        made.progress.begin(f"{label}: {', '.join(tasks)}", total + count_batches(answers.tasks))
        for i in range(total):
            check_stop()
            if presser is None:
                model.load_block_(i)
                answers.step_(i)
                model.drop_block_(i)
            else:
                presser.press_(i, last=i == total - 1)
            made.progress.advance(model.block_name(i))
        figures = answers.accuracies(noting(made, check_stop))
        return {"tasks": figures, "seconds": round(time.perf_counter() - started, 2)}

    return attempt(made, work)
