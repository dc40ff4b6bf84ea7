"""`bitpress compare`: what it prints, the page and the picture it leaves, exit codes, and every refusal in one line."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli import compare
from bitpress.cli.compare import Board, comparison_lines, ordered, parse_texts, parse_widths
from bitpress.comparison.results import Results
from bitpress.errors import NumericsError, UsageError
from bitpress.quantizers.gptq import GPTQ
from bitpress.report.compare_picture import draw_comparison, front

RECIPES = "rtn: {weights: 'int{bits}-g16-zero', quantizer: rtn, bits: [4, 3]}\ngptq <b>: {weights: 'int{bits}-g16-zero'}\n"


Run = Callable[..., Any]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    path = tmp_path / "recipes.yaml"
    path.write_text(RECIPES)
    return path


@pytest.fixture
def command(tiny_model: Callable[..., Path], recipes: Path, text_file: Path, tmp_path: Path) -> list[object]:
    calibration = ("--calibration", text_file, "--samples", 4, "--length", 32)
    start = ("compare", tiny_model(), tmp_path / "out", "--recipes", recipes, "--bits", "4,3")
    return [*start, "--tokens", 128, "--compute", "fp32", *calibration]


class Page(HTMLParser):
    """The cells of a page's tables, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag == "td":
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def test_a_table_rows_a_page_and_a_picture(bitpress: Run, command: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bitpress(*command)
    assert done.code == 0, done.err
    assert done.err.count("] rtn") == done.err.count("] gptq <b>") == 2, "a line a recipe in a log"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    measured = {(row["name"], row["bits"]): row for row in rows if row["kind"] == "recipe"}
    assert set(measured) == {(name, bits) for name in ("rtn", "gptq <b>") for bits in (4, 3)}
    table = [line.split("  ")[0].strip(" *") for line in done.out.splitlines() if line.startswith(("rtn", "gptq"))]
    best_first = sorted(measured.values(), key=lambda row: (-row["bits"], row["kl_mean"]))
    assert table == [f"{row['name']}, {row['bits']} bits" for row in best_first]
    for row in measured.values():
        assert f"{row['texts']['reference']['kl_mean']:.4f} ± {row['texts']['reference']['kl_ci95']:.4f}" in done.out
    text = (out / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [], "self-contained"
    assert "script" not in page.tags
    assert "b" not in page.tags, "names are escaped"
    assert "svg" in page.tags
    assert page.cells.count("gptq <b>, 4 bits") == 1
    ElementTree.parse(out / "compare.svg")
    again = bitpress(*command, "--json")
    assert again.code == 0
    told = json.loads(again.out)
    assert told["rows"] == [measured["rtn", 4], measured["rtn", 3], measured["gptq <b>", 4], measured["gptq <b>", 3]]
    assert len((out / "results.jsonl").read_text().splitlines()) == len(rows), "nothing was done again"


def test_options_reach_what_they_name(bitpress: Run, command: list[object], text_file: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "mine.txt"
    heldout.write_text(text_file.read_text()[::-1])
    options = ("--only", "gptq*", "--text", f"mine={heldout}", "--inputs", "pressed", "--seed", 3, "--keep", "--forget-capture")
    done = bitpress(*command, *options, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert list(told["texts"]) == ["mine"]
    assert [(row["name"], row["bits"], row["inputs"]) for row in told["rows"]] == [("gptq <b>", b, "pressed") for b in (4, 3)]
    assert {row["recipe"]["calibration"]["seed"] for row in told["rows"]} == {3}
    for bits in (4, 3):
        kept = CompressedCheckpoint.open(tmp_path / "out" / "models" / f"gptq--b--{bits}")
        assert kept.bits_per_weight == next(r["bits_per_weight"] for r in told["rows"] if r["bits"] == bits)
    assert not (tmp_path / "out" / "capture").exists()


def test_a_failed_recipe_is_told_and_is_in_the_exit_code(
    bitpress: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: GPTQ, *args: Any) -> Any:
        raise NumericsError("layer 1: broken by the test")

    monkeypatch.setattr(GPTQ, "quantize", fail)
    done = bitpress(*command)
    assert done.code == 1
    assert done.error == "error: 2 of 4 recipes failed: gptq <b>; their rows say why."
    assert "failed: gptq <b>, 3 bits: model.layers.0.self_attn.q_proj: layer 1: broken by the test" in done.out
    cells = Page((tmp_path / "out" / "compare.html").read_text(encoding="utf-8")).cells
    assert cells.count("model.layers.0.self_attn.q_proj: layer 1: broken by the test") == 2


def test_an_interrupt_ends_at_a_safe_point_and_the_same_command_goes_on(
    bitpress: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threading.current_thread() is threading.main_thread()
    add = Results.add

    def interrupt(self: Results, row: dict[str, Any]) -> None:
        add(self, row)
        if row.get("name") == "rtn":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the handler runs between two instructions of this thread

    monkeypatch.setattr(Results, "add", interrupt)
    done = bitpress(*command)
    assert done.code == 75
    assert "stopped by SIGINT" in done.error
    rows = tmp_path / "out" / "results.jsonl"
    assert len(rows.read_text().splitlines()) == 2, "the noise and one recipe"
    monkeypatch.setattr(Results, "add", add)
    assert bitpress(*command).code == 0
    assert len(rows.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "text", "says"),
    [
        (("--recipes", "missing.yaml"), RECIPES, "missing.yaml: does not exist"),
        ((), "a: {quantizer: gtpq}\n", "unknown quantizer 'gtpq'. Did you mean 'gptq'"),
        ((), "a: {weights: 'int{bits}-g16', quantizer: higgs}\n", "a, 4 bits: higgs serves gauss"),
        ((), "a: {weights: int4-g48}\n", "a: int4-g48"),
        (("--bits", "8"), "a: {weights: 'int{bits}-g16'}\n", "no recipe is meant for 8 bits"),
        (("--bits", "4,x"), RECIPES, "--bits '4,x'"),
        (("--bits", "4,4"), RECIPES, "--bits '4,4'"),
        (("--text", "news"), RECIPES, "--text 'news': write NAME=SOURCE"),
        (("--text", "news=missing.txt"), RECIPES, "missing.txt: does not exist"),
        (("--text", "x=builtin:heldout:nothing"), RECIPES, "unknown kind of the built-in heldout texts 'nothing'"),
        (("--compute", "fp8"), RECIPES, "compute"),
        (("--inputs", "both"), RECIPES, "calibration.inputs"),
        (("--samples", "100000"), RECIPES, "are needed"),
        (("--tokens", "100000000"), RECIPES, "are needed"),
        (("--length", "512"), RECIPES, "512"),
        (("--only", "awq"), RECIPES, "no recipe is called 'awq'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    options: tuple[str, ...], text: str, says: str, bitpress: Run, command: list[object], recipes: Path, tmp_path: Path
) -> None:
    recipes.write_text(text)
    done = bitpress(*command, *options)
    assert done.code == 2, done.err
    assert says in done.error
    assert not (tmp_path / "out").exists()
    assert done.out == ""


def test_another_things_directory_is_refused(bitpress: Run, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = bitpress(*command)
    assert (done.code, "holds something else than a comparison" in done.error) == (2, True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------------------------- picture


def row(name: str, bits: int | None, stored: float, kl: float | None, failed: str | None = None) -> dict[str, Any]:
    figures = {"kl_mean": kl, "kl_ci95": 0.01, "top1_agreement": 0.5, "perplexity": None, "perplexity_original": 9.0}
    shared = {"name": name, "bits": bits, "failed": failed}
    if failed:
        return shared
    measured = {"bits_per_weight": stored, "kl_mean": kl, "kl_ci95": 0.01, "texts": {"t": figures}, "error": 0.1}
    return {**shared, **measured, "seconds_pressing": 1.0, "seconds_measuring": 61.0, "peak_memory_bytes": 2e9, "fallbacks": 3}


ROWS = [
    row("a", 4, 4.3, 0.10),
    row("b", 4, 4.2, 0.12),
    row("c", 4, 4.4, 0.10),
    row("a", 3, 3.3, 0.5),
    row("d", None, 3.3, 0.4),
    row("e", 2, 0, None, "broken"),
]


def test_the_front_is_what_no_other_row_beats() -> None:
    assert [(r["name"], r["bits"]) for r in front(ROWS)] == [("d", None), ("b", 4), ("a", 4)]
    assert front([]) == []


def test_lines_are_by_width_the_best_first() -> None:
    assert [r["label"] for r in ordered(ROWS)] == ["a, 4 bits", "c, 4 bits", "b, 4 bits", "d", "a, 3 bits", "e, 2 bits"]
    assert [r["opens"] for r in ordered(ROWS)] == [False, False, False, True, False, True]
    lines = comparison_lines(ROWS, ["t"])
    assert lines[0] == ("a, 4 bits *", "4.300", "0.1000 ± 0.0100", "50.0 %", "0.1", "1:02", "2000", "3")
    assert lines[-1][:2] == ("e, 2 bits", "failed")
    assert {len(line) for line in lines} == {8}


def test_the_picture_has_every_point_once_at_its_place() -> None:
    drawn = ElementTree.fromstring(draw_comparison(ROWS, "what <it> costs & more"))
    space = "{http://www.w3.org/2000/svg}"
    points = {}
    for path in drawn.iter(f"{space}path"):
        title = path.find(f"{space}title")
        if title is not None:
            x, y = path.attrib["transform"].removeprefix("translate(").removesuffix(")").split()
            points[str(title.text)] = (float(x), float(y))
    assert len(points) == 5
    told = {text.split(":")[0]: place for text, place in points.items()}
    assert set(told) == {"a at 4", "b at 4", "c at 4", "a at 3", "d"}
    assert told["b at 4"][0] < told["a at 4"][0] < told["c at 4"][0], "more bits are to the right"
    assert told["a at 4"][1] == told["c at 4"][1] > told["b at 4"][1] > told["d"][1] > told["a at 3"][1], "less KL is below"
    height, width = 4.4 - 3.3, told["c at 4"][0] - told["d"][0]
    assert told["a at 4"][0] == pytest.approx(told["d"][0] + width * 1.0 / height, abs=0.2)
    texts = [element.text for element in drawn.iter(f"{space}text")]
    assert "what <it> costs & more" in texts
    assert "nothing to draw: no recipe has a distance" in draw_comparison([ROWS[-1]], "x")


def test_a_crowd_has_one_look_for_recipes_and_one_for_other_packages() -> None:
    rows = [row(f"r{i}", 4, 4.0 + i / 20, 1.0 - i / 40) for i in range(20)]
    rows += [{**row(f"p{i}", 4, 4.0 + i / 20, 2.0 - i / 40), "kind": "peer"} for i in range(8)]
    space = "{http://www.w3.org/2000/svg}"
    drawn = ElementTree.fromstring(draw_comparison(rows, "x"))
    texts = [text.text for text in drawn.iter(f"{space}text")]
    assert {"recipes", "other packages"} <= set(texts)
    marks = [path for path in drawn.iter(f"{space}path") if path.find(f"{space}title") is not None]
    assert len(marks) == 28
    assert len({mark.attrib["fill"] for mark in marks}) == 2
    assert len([path for path in drawn.iter(f"{space}path") if path.attrib.get("stroke-width") == "7"]) == 2, "a front of each"
    few = ElementTree.fromstring(draw_comparison(rows[:3], "x"))
    assert "recipes" not in [text.text for text in few.iter(f"{space}text")]


def test_one_recipe_and_a_kl_of_zero_can_be_drawn() -> None:
    for rows, shown in (([row("a", 4, 4.0, 0.1)], "a"), ([row("a", 4, 4.0, 0.0), row("b", 4, 4.0, 1e-6)], "b")):
        texts = [text.text for text in ElementTree.fromstring(draw_comparison(rows, "x")).iter() if text.text]
        assert shown in texts
        assert ("a" in texts) == (shown == "a"), "a distance of zero has no place on a logarithmic axis"


def test_widths_and_texts() -> None:
    assert parse_widths("4,3, 2") == [4, 3, 2]
    for wrong in ("", "4,", "0", "17", "4.5", "-1", "4,4"):
        with pytest.raises(UsageError, match="--bits"):
            parse_widths(wrong)
    assert parse_texts(None, {"a": "b"}) == {"a": "b"}
    assert parse_texts(["n=x=y.txt"], {"a": "b"}) == {"n": "x=y.txt"}
    for twice in (["a=b", "a=c"], ["=b"], ["a="], ["a b=c"]):
        with pytest.raises(UsageError, match="--text"):
            parse_texts(twice, {})


def test_a_terminal_sees_the_table_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(force_terminal=True, width=120, height=30, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(compare, "err", shown)
    board = Board(2, ["t"])
    board.begin("a, 4 bits", 30)
    board.advance("layers.0", error=0.25)
    board.row(ROWS[0])
    shown.print(board._render())
    text = shown.export_text()
    assert "a, 4 bits" in text
    assert "0.1000 ± 0.0100" in text
    assert "1 of 2 recipes; a, 4 bits: 1/30 layers.0  error 0.25" in text
    shown.file.close()
