"""Zero-shot accuracy on the screen: the names of tasks, a line for each, and cells for a table of recipes."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.errors import UsageError

__all__ = ["accuracy_line", "accuracy_rows", "by_recipe", "heading", "parse_tasks", "percent"]

Row = Mapping[str, Any]


def parse_tasks(text: str | None) -> list[str]:
    """'arc-easy,piqa' -> ['arc-easy', 'piqa']. Raises UsageError."""
    names = [] if text is None else [part.strip() for part in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise UsageError(f"--tasks {text!r}: write names separated by commas, each once, such as arc-easy,piqa.")
    return names


def heading(task: str) -> str:
    """Return the heading of a task's column: its name, or that of its file."""
    return task.rpartition("/")[2]


def percent(figures: Row, key: str) -> str:
    """Return a share in per cent with its standard error."""
    width = figures[f"{key}_stderr"]
    return f"{100 * figures[key]:.1f}" + ("" if width is None else f" ± {100 * width:.1f}")


def accuracy_line(figures: Row) -> str:
    return f"{percent(figures, 'acc')} %, by length {percent(figures, 'acc_norm')} %, {figures['documents']} questions"


def accuracy_rows(figures: Row) -> dict[str, str]:
    """Return the lines of `eval` for tasks, with the original's figures where it was measured too."""
    rows = {}
    for name, own in figures.get("tasks", {}).items():
        original = figures.get("tasks_original", {}).get(name)
        beside = "" if original is None else f" (original {percent(original, 'acc')} %, {percent(original, 'acc_norm')} %)"
        rows[name] = accuracy_line(own) + beside
    return rows


def by_recipe(answers: Sequence[Row]) -> dict[tuple[Any, Any], dict[str, Row]]:
    """Return the rows by (name, bits) of the recipe and then by task; (None, None) is the original."""
    rows: dict[tuple[Any, Any], dict[str, Row]] = {}
    for row in answers:
        if not row["failed"]:
            rows.setdefault((row["name"], row["bits"]), {})[row["task"]] = row
    return rows
