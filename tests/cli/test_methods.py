"""`bitpress methods`: every row of the tables, as JSON and on a narrow screen."""

import json
import sys

import pytest

from bitpress.allocation.choices import CHOICES
from bitpress.calibration import STATISTICS
from bitpress.cli import screen
from bitpress.cli.app import main
from bitpress.corrections.table import BIAS_CORRECTIONS, CORRECTIONS, OFFSET_CORRECTIONS
from bitpress.quantizers.table import QUANTIZERS
from bitpress.transforms.table import BASIS_CHANGES, NETWORK_CHANGES, SCALE_SEARCHES, TARGETS, TRANSFORMS
from bitpress.tuning.table import TUNINGS


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr(screen.out, "_width", 100)
    monkeypatch.setattr(sys, "argv", ["bitpress", "methods", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_every_method_is_listed_with_all_there_is_to_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(listed(monkeypatch, capsys, "--json"))
    corrections = {**CORRECTIONS, **BIAS_CORRECTIONS, **OFFSET_CORRECTIONS}
    tables = {"quantizer": QUANTIZERS, "transform": TRANSFORMS, "correction": corrections, "tuning": TUNINGS, "choice": CHOICES}
    named = {kind: {r["name"] for r in rows if r["kind"] == kind} for kind in tables}
    assert named == {kind: set(table) for kind, table in tables.items()}
    for row in rows:
        assert {"name", "kind", "summary", "paper", "needs", "bits", "settings"} <= set(row)
        assert row["summary"]
        assert set(row["needs"]) <= set(STATISTICS)
        paper = row["paper"]
        of_papers = row["kind"] not in ("observer", "scheme")  # those are of tools
        assert (
            not of_papers or paper.startswith("yardstick: ") or (len(paper) == 4 and paper[0] == "P" and paper[1:].isdigit())
        ), row["name"]
        if row["kind"] == "quantizer":
            least, most = row["bits"]
            assert 0 < least <= most <= 16
            assert {part["name"] for part in row["transforms"]} <= set(TRANSFORMS)
        else:
            assert row["bits"] is None
    lqer = next(r for r in rows if r["name"] == "lqer")
    assert lqer["settings"] == {"rank": 32, "dtype": "fp16", "scale": "mean_abs"}
    assert lqer["needs"] == ["gram", "mean_abs"]
    works_on = {r["name"]: r["works_on"] for r in rows if r["kind"] == "transform"}
    assert {n for n, on in works_on.items() if on == "network"} == set(NETWORK_CHANGES)
    assert {n for n, on in works_on.items() if on == "weights"} == set(BASIS_CHANGES)
    assert {n for n, on in works_on.items() if on == "groups"} == set(SCALE_SEARCHES)
    assert {n for n, on in works_on.items() if on == "targets"} == set(TARGETS)


def test_the_table_names_them_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = listed(monkeypatch, capsys)
    for name in (*QUANTIZERS, *TRANSFORMS, *CORRECTIONS, *TUNINGS):
        assert name in shown.split(), name


def test_one_method_is_shown_with_all_its_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = listed(monkeypatch, capsys, "QuIP-Sharp")
    assert shown.startswith("quip_sharp, a quantizer\n")
    for setting in ("residual", "sweeps", "rms"):
        assert setting in shown.split()
    assert json.loads(listed(monkeypatch, capsys, "awq", "--json"))["name"] == "awq"
