"""The report of a run as data, and the model card made from it."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from bitpress.checkpoints.given import Given
from bitpress.checkpoints.side_files import LeftBehind
from bitpress.figures import shown, written
from bitpress.models.task import Task
from bitpress.pipeline.front_matter import write_front_matter
from bitpress.pipeline.plan import Plan
from bitpress.pipeline.records import LayerRow

__all__ = ["make_card", "make_report"]


def make_report(
    figures: Mapping[str, Any],
    rows: Sequence[LayerRow],
    plan: Plan,
    identity: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None,
    source_bytes: int,
    given: Given | None,
    left_out: Sequence[str],
    left_behind: Sequence[LeftBehind],
    timing: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a run's figures together; every value can be written as JSON (`figures`). Raises NumericsError for a NaN or an infinity.

    `source_bytes` are those of the tensors that were read; if these were converted from a file of the user, that file is the original,
    and sizes are compared with it.
    """
    original_bytes = source_bytes if given is None else given.nbytes
    fallbacks = [{"weight": row.name, "what": text} for row in rows for text in row.fallbacks]
    notes = [{"weight": row.name, "what": text} for row in rows for text in row.notes]
    reached = sum(1 for row in rows if row.calibrated)
    return {
        "figures": written(figures, "the proof"),
        "size": {
            "bytes": figures["bytes"],
            "bytes_original": original_bytes,
            "bytes_converted": None if given is None else source_bytes,
            "ratio": original_bytes / figures["bytes"],
            "bytes_compressed_weights": plan.compressed_bytes,
            "bytes_kept": plan.kept_bytes,
        },
        "calibration": dict(calibration) if calibration else None,
        "calibrated": {"weights": reached, "of": len(rows)},
        "fallbacks": fallbacks,
        "notes": notes,
        "kept": plan.kept,
        "given": None if given is None else {**given.as_dict(), "text": given.text},
        "left_out": list(left_out),
        "left_behind": [{"file": item.file, "why": item.why} for item in left_behind],
        "layers": [row.model_dump() for row in rows],
        "run": dict(timing),
        "job": dict(identity),
    }


def make_card(report: Mapping[str, Any], name: str, head: Mapping[str, Any], task: Task) -> str:
    """Write the model card (README.md of the published directory) from the report; `head` holds the keys that hubs read."""
    from jinja2 import Environment, StrictUndefined

    template = files("bitpress.pipeline").joinpath("card.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["shown"] = shown
    return environment.from_string(template).render(report=report, name=name, head=write_front_matter(head), task=task) + "\n"
