"""The data of a report: declared to the last key, valid under the published schema, and readable in older versions."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bitpress.checkpoints.jsonfile import write_json_bytes
from bitpress.errors import CheckpointError
from bitpress.report.document import Figures, check_report, dump_report, read_report, report_schema

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report.schema.json"
Make = Callable[[str], Path]
# Keys that came after the first reports.
LATER = ("continuations", "model", "auto_class", "notes", "outer", "left_behind")


def undeclared(value: Any, place: str = "report") -> Iterator[str]:
    """Yield every key of a report, at any depth, that no record declares. A task's own figures need no declaration."""
    if isinstance(value, BaseModel):
        if not isinstance(value, Figures):
            yield from (f"{place}.{key}" for key in value.model_extra or {})
        for key in type(value).model_fields:
            yield from undeclared(getattr(value, key), f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from undeclared(item, place)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_every_key_that_is_written_is_declared(architecture: str, published: Make, report_json: Callable[[str], Any]) -> None:
    report = read_report(published(architecture))
    assert list(undeclared(report)) == []
    assert set(report.figures.model_extra or ()) == set()
    assert dump_report(report) == report_json(architecture), "nothing is lost"


def test_a_key_that_is_not_declared_would_be_seen(report_json: Callable[[str], Any]) -> None:
    value = report_json("llama")
    value["size"]["bytes_of_a_new_kind"] = 1
    assert list(undeclared(check_report(value, "here"))) == ["report.size.bytes_of_a_new_kind"]


def test_the_published_schema_is_that_of_the_records() -> None:
    assert SCHEMA.read_bytes() == write_json_bytes(report_schema()), "run `python scripts/list_report.py`"


def test_a_report_says_what_the_run_measured(published: Make) -> None:
    report = read_report(published("llama"))
    f = report.figures
    assert f.by_text is not None
    assert f.by_position is not None
    assert sum(found.windows for found in f.by_text) == f.windows == 8
    assert [(p.first, p.last) for p in f.by_position] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    everywhere = sum((p.last - p.first + 1) * float(p.kl_mean) for p in f.by_position) / 64
    assert everywhere == pytest.approx(f.kl_mean, rel=1e-9)
    by_kind = sum(found.windows * float(found.kl_mean) for found in f.by_text) / f.windows
    assert by_kind == pytest.approx(f.kl_mean, rel=1e-9)
    assert report.continuations is not None
    assert report.continuations.omitted is None
    assert len(report.continuations.texts) == 3
    assert all(row.picture is not None for row in report.layers)


def test_lists_of_numbers_take_one_line(published: Make) -> None:
    lines = (published("llama") / "report.json").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip().rstrip(",").replace(".", "").isdigit()]


def test_an_older_report_is_read(report_json: Callable[[str], Any]) -> None:
    value = report_json("llama")
    for key in LATER:
        del value[key]
    for key in ("by_text", "by_position", "runtime"):
        del value["figures"][key]
    del value["size"]["bytes_outer"], value["size"]["bytes_converted"]
    for row in value["layers"]:
        del row["picture"], row["seconds"]
    report = check_report(value, "older")
    assert report.continuations is None
    assert report.layers[0].picture is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("layers"), "layers: Field required"),
        (lambda r: r["size"].update(bytes="many"), "size.bytes"),
        (lambda r: r["figures"].update(kl_mean="nan"), "figures.kl_mean"),
        (lambda r: r["layers"].append({"name": "x"}), "layers.*: Field required"),
        (lambda r: r["layers"][0]["picture"].pop("channels"), "picture.channels"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(
    change: Callable[[Any], Any], says: str, report_json: Callable[[str], Any], tmp_path: Path
) -> None:
    value = report_json("llama")
    change(value)
    (tmp_path / "report.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"report\.json: is no report of bitpress: .*{says}"):
        read_report(tmp_path)


def test_a_directory_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no report\.json; name a directory"):
        read_report(tmp_path)
