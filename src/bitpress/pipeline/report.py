"""The report of a run as data, and what is made from it: the model card and the page.

report.json     the data (`bitpress.report.document`)       README.md   the card, for hubs
report.html     the page (`bitpress.report.page`), to look at and to forward
"""

import re
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any

from bitpress.calibration.held_out import MASSIVE, TOKEN_CLASSES
from bitpress.checkpoints.given import Given
from bitpress.checkpoints.jsonfile import parse_json, write_json_bytes
from bitpress.checkpoints.parameter import stem
from bitpress.checkpoints.side_files import LeftBehind
from bitpress.figures import ratio_text, shown, written
from bitpress.models.task import Task
from bitpress.pipeline.front_matter import write_front_matter
from bitpress.pipeline.oddities import told_untied
from bitpress.pipeline.outer_weights import PlannedOuter
from bitpress.pipeline.plan import Plan
from bitpress.pipeline.records import LayerRow, TunedSpan
from bitpress.pipeline.token_errors import FAR, far_classes
from bitpress.report.document import REPORT_NAME, check_report
from bitpress.report.page import write_page
from bitpress.report.sentences import say_learned
from bitpress.version import INSTALL

__all__ = ["TEXTS", "make_card", "make_report", "write_report_page", "write_texts_"]

# The files that are written here.
TEXTS = (REPORT_NAME, "README.md", "report.html")
_NUMBERS = re.compile(rb"\[\n[-+.,\d\se]+\]")


def make_report(
    figures: Mapping[str, Any],
    rows: Sequence[LayerRow],
    tuned: Sequence[TunedSpan],
    plan: Plan,
    identity: Mapping[str, Any],
    *,
    model: str,
    auto_class: str,
    compressed: Collection[str],
    calibration: Mapping[str, Any] | None,
    held_out: int,
    source_bytes: int,
    given: Given | None,
    left_out: Sequence[str],
    left_behind: Sequence[LeftBehind],
    timing: Mapping[str, object],
) -> dict[str, Any]:
    """Put a run's figures together; every value can be written as JSON (`figures`). Raises NumericsError for a NaN or an infinity.

    `model` is the original's name, `auto_class` transformers' class for it; `compressed` are the names of the parameters that are stored
    so; `held_out` counts the samples that errors were measured on beside those of calibration; `source_bytes` are those of the tensors
    that were read. Sizes are compared with what the user gave: the file that was converted to these, or the tensors and the files beside
    them. `write_texts_` enters the published bytes and their ratio.
    """
    untied = [{"weight": stem(alias), "what": text} for alias, text in zip(plan.untied, told_untied(plan), strict=True)]
    budget = identity["recipe"].get("budget")  # recipes of before have no such key
    spent = {"bits_asked": budget and budget["bits"], "bits_spent": figures["bits_per_weight"], "weights": plan.by_format()}
    # A head that bitpress chose a format for may have stayed as stored; its row says why.
    outer = [(found, row) for found in plan.outer for row in rows if row.name == found.planned.parameter.stem]
    made = [(found, row) for found, row in outer if found.planned.parameter.name in compressed]
    as_stored = sum(row.bytes for found, row in outer if found.planned.parameter.name not in compressed)
    return {
        "model": model,
        "auto_class": auto_class,
        "figures": written({key: value for key, value in figures.items() if key != "continuations"}, "the proof"),
        "continuations": figures.get("continuations"),
        "size": {
            "bytes_original": plan.given_bytes,
            "bytes_converted": None if given is None else source_bytes,
            "bytes_compressed_weights": plan.compressed_bytes,
            "bytes_outer": sum(row.bytes for _, row in made),
            "bytes_kept": plan.kept_bytes + as_stored,
        },
        **({} if budget is None else {"budget": spent}),
        "calibration": dict(calibration) if calibration else None,
        "held_out": _held_out(rows, held_out) if held_out else None,
        "calibrated": _calibrated(rows, plan),
        "fallbacks": [{"weight": row.name, "what": text} for row in rows for text in row.fallbacks] + told_early(tuned),
        "notes": [{"weight": row.name, "what": text} for row in rows for text in row.notes] + untied,
        **({"tuned": [row.model_dump() for row in tuned]} if tuned else {}),
        "outer": [_outer_row(found, row) for found, row in made],
        "kept": plan.kept,
        "given": None if given is None else {**given.as_dict(), "text": given.text},
        "left_out": list(left_out),
        "left_behind": [{"file": item.file, "why": item.why} for item in left_behind],
        "layers": [row.model_dump() for row in rows],
        "run": dict(timing),
        "job": dict(identity),
    }


def told_early(tuned: Sequence[TunedSpan]) -> list[dict[str, str]]:
    """Return the fallbacks of spans that were not learned to their end."""
    left = {True: "what was best until then is kept", False: "its start is kept"}
    return [
        {"weight": row.name, "what": f"{row.tuning} ended early ({row.failed.removesuffix('.')}); {left[row.kept]}"}
        for row in tuned
        if row.failed is not None
    ]


def _calibrated(rows: Sequence[LayerRow], plan: Plan) -> dict[str, int]:
    """Count the weights whose codes calibration decided, of those whose inputs it sees."""
    never = {found.planned.parameter.stem for found in plan.outer if not found.last}  # tables have no statistics
    by_inputs = [row for row in rows if row.name not in never]
    return {"weights": sum(row.calibrated for row in by_inputs), "of": len(by_inputs)}


def _held_out(rows: Sequence[LayerRow], samples: int) -> dict[str, object]:
    """Say on how much held-out text errors were measured, and how many weights have a class of tokens that is far off."""
    far = [name for row in rows for name in far_classes(row.held_out)]
    counts = {name: far.count(name) for name in TOKEN_CLASSES}
    return {"samples": samples, "massive_above": MASSIVE, "far_above": FAR, "weights_far": counts}


def _outer_row(found: PlannedOuter, row: LayerRow) -> dict[str, object]:
    stored = row.model_dump(include={"name", "shape", "format", "bytes", "bits_per_weight"})
    return {"key": found.key, "quantizer": found.planned.method.quantizer.name, **stored}


def write_texts_(
    report: Mapping[str, Any], name: str, head: Mapping[str, object], task: Task, other_bytes: int
) -> dict[str, bytes]:
    """Return report.json and the card, and enter the bytes of the whole published directory into the report, with their ratio.

    These two files count, and hold the sum themselves: they are written for a larger sum until they fit into it, and blank lines at the
    end of the card fill the rest. `other_bytes` are those of all others but the page (`write_report_page`).
    """
    total = other_bytes
    while True:
        report["size"].update(bytes=total, ratio=report["size"]["bytes_original"] / total)
        texts = {REPORT_NAME: _write_data(report), "README.md": make_card(report, name, head, task).encode()}
        found = other_bytes + sum(map(len, texts.values()))
        if found <= total:  # a digit more or less in the sum or the ratio: an equal sum may not exist
            texts["README.md"] += b"\n" * (total - found)
            return texts
        total = found


def write_report_page(data: bytes, name: str) -> dict[str, bytes]:
    """Return report.html for the bytes of report.json, as `bitpress report` writes it again at any time.

    It does not count in the size of the directory: no reader of the model needs it.
    """
    return {"report.html": write_page(check_report(parse_json(data, REPORT_NAME), name), name).encode()}


def _write_data(report: Mapping[str, object]) -> bytes:
    """Write the data as canonical JSON, with lists of numbers on one line: there are thousands of them. A line break is never in a string."""
    return _NUMBERS.sub(lambda found: b"".join(found.group().split()), write_json_bytes(report))


def make_card(report: Mapping[str, Any], name: str, head: Mapping[str, object], task: Task) -> str:
    """Write the model card (README.md of the published directory) from the report; `head` holds the keys that hubs read."""
    from jinja2 import Environment, StrictUndefined

    template = files("bitpress.pipeline").joinpath("card.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"shown": shown, "ratio_text": ratio_text}
    environment.globals["install"] = INSTALL
    learned = say_learned([TunedSpan.model_validate(row) for row in report.get("tuned", ())])
    values = {"report": report, "name": name, "head": write_front_matter(head), "task": task, "learned": learned}
    return environment.from_string(template).render(values) + "\n"
