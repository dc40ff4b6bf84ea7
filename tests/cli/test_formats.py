"""`bitpress formats`: every table, in a hundred columns, and what is measured of a model as a table, as JSON and as a picture."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitpress.cli import screen
from bitpress.cli.app import main
from bitpress.evaluation.rate import best_rows
from bitpress.formats import GRIDS, LAYOUTS, PATTERNS, SCALES, SHORT, parse_format
from bitpress.formats.listing import usual_formats
from bitpress.measure import format_rates as rates

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bitpress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(screen.out, "_width", 100)
        monkeypatch.setattr(sys, "argv", ["bitpress", *map(str, arguments)])
        monkeypatch.setattr(rates, "DRAWN", (8, 64))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_table_is_listed(bitpress: Run) -> None:
    code, out, _ = bitpress("formats", "--json")
    assert code == 0
    rows = json.loads(out)
    names = {kind: [r["name"] for r in rows if r["kind"] == kind] for kind in ("grid", "family", "scale", "layout", "short")}
    assert {name.split("-")[0] for name in names["grid"]} == set(GRIDS)
    assert {name.split("-")[0] for name in names["grid"] if name.endswith("-zero")} == {
        name for name, row in GRIDS.items() if row.zeros and row.zeros["zero"] != row.grid
    }
    assert names["scale"] == list(SCALES)
    assert names["layout"] == list(LAYOUTS)
    assert names["short"] == list(SHORT)
    assert len(names["family"]) == len(PATTERNS)
    for row in rows:
        if row["kind"] == "grid":
            fmt = parse_format(row["usual"])
            assert row["bits_per_weight"] == fmt.nbytes((4096, 4096)) * 8 / 4096**2
            assert fmt.layout in row["layouts"]


def test_the_usual_formats_are_one_a_grid_and_the_named_ones() -> None:
    formats = usual_formats()
    assert len({fmt.name for fmt in formats}) == len(formats)
    assert {fmt.grid.name for fmt in formats} == set(GRIDS)
    assert {parse_format(name) for name in SHORT} <= set(formats)
    with_zero = {fmt.grid.name for fmt in formats if any(p.name == "zero" for p in fmt.grid.params)}
    assert {name for name, row in GRIDS.items() if row.zeros} <= with_zero
    assert next(fmt for fmt in formats if fmt.grid.name == "ternary").layout == "base3", "the tightest layout"


def test_the_list_fits_a_hundred_columns(bitpress: Run) -> None:
    code, out, _ = bitpress("formats")
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
    for name in (*GRIDS, *SCALES, *LAYOUTS, *SHORT):
        assert any(line.startswith((name, f"{name}-")) for line in out.splitlines()), name


def test_a_model_is_measured(bitpress: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    command = ("formats", "--measure", model, "--format", "int4-g32", "--format", "ternary-g16-base3")
    code, out, err = bitpress(*command, "--json")
    assert code == 0, err
    measured = json.loads(out)
    assert {row["source"] for row in measured["rows"]} == {"model", "gaussian", "laplace", "student5"}
    code, out, _ = bitpress(*command, "--all")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    best = best_rows(measured, "model")
    assert [line[:2] for line in lines if line and line[0] in best] == [
        [name, f"{row['bits_per_weight']:.3f}"] for name, row in best.items()
    ], "in the order of bits"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(suffix: str, bitpress: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / f"formats{suffix}"
    names = ("int2-g16", "int3-g16", "int4-g16-zero", "nf4-row", "mxfp4", "e2m1-g16")
    formats = [part for name in names for part in ("--format", name)]
    code, _, err = bitpress("formats", "--measure", tiny_model("llama"), *formats, "--picture", target)
    assert code == 0, err
    content = target.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    for name in ("int2-g16", "nf4-row", "mxfp4", "Gaussian bound", "signal-to-noise ratio, dB"):
        assert name in text, name


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--format", "int4-g64"), 2, "need --measure MODEL"),
        (("--all",), 2, "need --measure MODEL"),
        (("--picture", "x.png"), 2, "need --measure MODEL"),
        (("--measure", "MODEL", "--picture", "x.gif"), 2, "a .png or .svg file"),
        (("--measure", "MODEL", "--picture", "no/such/folder/x.png"), 2, "does not exist"),
        (("--measure", "MODEL", "--format", "nit4-g64"), 2, "Did you mean 'int4'"),
        (("--measure", "MODEL", "--format", "int4-g48"), 2, "fits no matrix"),
        (("--measure", "missing"), 3, "no such file or directory"),
    ],
)
def test_wrong_use_is_one_clear_line(
    arguments: tuple[str, ...], code: int, says: str, bitpress: Run, tiny_model: Callable[..., Path]
) -> None:
    done = bitpress("formats", *(tiny_model("llama") if word == "MODEL" else word for word in arguments))
    assert done[0] == code, done
    lines = [line for line in done[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert done[1] == ""
