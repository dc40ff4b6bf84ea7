"""Tasks in a comparison: the figures are those of the model that was pressed, for the best recipes only, and a run goes on where it stopped."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.comparison import tasks as compare_tasks
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.tasks import choose_best, sure_to_answer, width_of
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.errors import JobStopped, NumericsError, UsageError
from bitpress.measure.multiple_choice import evaluate_tasks
from bitpress.quantizers.gptq import GPTQ
from bitpress.recipes import Calibration, Recipe, build_method

RECIPES = """
plain: {weights: "int{bits}-g16-zero", quantizer: rtn, bits: [3, 2]}
gptq: {weights: "int{bits}-g16-zero"}
follows: {weights: int3-g16-zero, calibration: {inputs: pressed}}
"""
FIGURES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents")

Run = Callable[..., dict[str, Any]]


class Stages:
    """Hears the stages of a run but for those that end one, and stops it at the begin of one."""

    def __init__(self, stop_at: str = "") -> None:
        self.stages, self.stop_at = list[str](), stop_at
        self.left = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        assert self.left == 0, f"{self.stages[-1]} has {self.left} units left"
        if not what.endswith(", answering"):
            self.stages.append(what)
        self.left = total - done
        if what == self.stop_at:
            raise JobStopped("stopped by the test")

    def advance(self, unit: str, **figures: Any) -> None:
        self.left -= 1

    def note(self, text: str) -> None:
        pass


@pytest.fixture
def task_files(tmp_path: Path, text_file: Path) -> list[str]:
    """Two tasks of sentences that go on in one of two ways."""
    words = text_file.read_text(encoding="utf-8").split()
    files = []
    for number, choices in enumerate((2, 3)):
        rows = []
        for k in range(24):
            at = 200 * number + 7 * k
            ways = [" ".join(words[at + 5 + 3 * j : at + 6 + 4 * j]) for j in range(choices)]
            rows.append({"context": " ".join(words[at : at + 5]) + " ", "choices": ways, "answer": k % choices})
        path = tmp_path / f"task{number}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        files.append(str(path))
    return files


@pytest.fixture
def run(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> Run:
    """Compare recipes on a tiny llama in float32."""
    (tmp_path / "recipes.yaml").write_text(RECIPES)
    calibration = {"text": str(text_file), "samples": 4, "length": 32}

    def go(*names: str, widths: tuple[int, ...] = (3, 2), **settings: Any) -> dict[str, Any]:
        made, _ = read_candidates(tmp_path / "recipes.yaml", widths, calibration, compute="fp32", only=names)
        shared = Calibration(**{"inputs": "original", **calibration})
        settings = {"tokens": 128, "length": 32, "shared": shared} | settings
        return compare_recipes(tiny_model(), tmp_path / "out", made, **settings)

    return go


def asked(done: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(dict.fromkeys((row["name"], row["bits"]) for row in done["answers"]))


def test_answers_are_those_of_the_pressed_model(
    run: Run, tiny_model: Callable[..., Path], task_files: list[str], tmp_path: Path
) -> None:
    calls = Stages()
    heard: list[dict[str, Any]] = []
    done = run(tasks=task_files, documents=20, best=1, keep=True, progress=calls, note_row=heard.append)
    assert calls.left == 0
    assert done["tasks"] == dict.fromkeys(task_files, 20)
    best = {}
    for row in sorted(done["rows"], key=lambda row: -row["kl_mean"]):
        best[width_of(row)] = (row["name"], row["bits"])
    assert sorted(best) == [2, 3, 4], "follows stores more than 4 bits with its scales"
    assert asked(done) == [(None, None), best[4], best[3], best[2]]
    assert heard[len(done["rows"]) :] == done["answers"]
    for row in done["answers"]:
        name = row["name"] if row["bits"] is None else f"{row['name']}-{row['bits']}"
        directory = tiny_model() if row["name"] is None else tmp_path / "out" / "models" / name
        alone = evaluate_tasks(directory, [row["task"]], documents=20, dtype=torch.float32)[row["task"]]
        assert {key: row[key] for key in FIGURES} == alone
    assert len({(row["acc"], row["acc_norm"]) for row in done["answers"]}) > 2, "they do not all answer alike"


def test_a_run_goes_on_and_a_new_task_costs_only_itself(run: Run, task_files: list[str], tmp_path: Path) -> None:
    one, two = task_files
    first = run("plain", "gptq", tasks=[one], best=1)
    good = {bits: name for name, bits in asked(first)[1:]}
    poor = {bits: "gptq" if name == "plain" else "plain" for bits, name in good.items()}
    calls = Stages()
    assert run("plain", "gptq", tasks=[one], best=1, progress=calls) == first
    assert calls.stages == [], "all is there"
    calls = Stages(stop_at=f"{good[3]}, 3 bits: {two}")
    with pytest.raises(JobStopped):
        run("plain", "gptq", tasks=[one, two], best=1, progress=calls)
    assert calls.stages == [f"original: {two}", f"{good[3]}, 3 bits: {two}"]
    calls = Stages()
    done = run("plain", "gptq", tasks=[one, two], best=1, progress=calls)
    assert calls.stages == [f"{good[3]}, 3 bits: {two}", f"{good[2]}, 2 bits: {two}"]
    assert [row for row in done["answers"] if row["task"] == one] == first["answers"]
    calls = Stages()
    run("plain", "gptq", tasks=[one], best=2, progress=calls)
    assert calls.stages == [f"{poor[3]}, 3 bits: {one}", f"{poor[2]}, 2 bits: {one}"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert kinds == ["floor", *["recipe"] * 4, *["tasks"] * 8]
    calls = Stages()
    run("plain", "gptq", tasks=[one], documents=5, best=1, progress=calls)
    assert len(calls.stages) == 3, "other questions"
    assert run("plain", "gptq")["answers"] == []


@pytest.mark.release
def test_recipes_that_are_sure_to_be_asked_answer_while_they_are_pressed(
    run: Run, task_files: list[str], tmp_path: Path
) -> None:
    late = run("plain", "gptq", tasks=task_files, best=1)
    twice = run("plain", "gptq", tasks=task_files, best=2)
    shutil.rmtree(tmp_path / "out")
    calls = Stages()
    with pytest.raises(JobStopped):
        run("plain", "gptq", tasks=task_files, best=2, progress=Stages(stop_at="gptq, 2 bits"))
    once = run("plain", "gptq", tasks=task_files, best=2, progress=calls)
    assert calls.left == 0
    assert [stage for stage in calls.stages if ":" in stage] == [f"original: {', '.join(task_files)}"]

    def told(done: dict[str, Any]) -> list[Any]:
        return [[row[key] for key in ("name", "bits", "task", *FIGURES)] for row in done["answers"]]

    assert told(once) == told(twice)
    assert {str(row) for row in told(late)} < {str(row) for row in told(once)}, "of the best alone, pressed twice"
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert not any("answers" in row for row in lines)
    names = Counter((row["name"], row["bits"], row.get("task")) for row in lines if row["kind"] != "floor")
    assert set(names.values()) == {1}, "nothing twice"


def test_who_is_sure_to_answer() -> None:
    def candidate(name: str, bits: int | None) -> Variant:
        return Variant(name, bits, build_method(Recipe(quantizer={"name": "rtn"})))

    three, two = [candidate("a", 3), candidate("b", 3)], [candidate("c", 2)]
    assert sure_to_answer([*three, *two], 2) == {*three, *two}
    assert sure_to_answer([*three, *two], 1) == {*two}
    assert sure_to_answer([*two, candidate("d", None)], 3) == frozenset(), "its width may be 2"


def test_a_capture_that_was_removed_is_made_again(run: Run, task_files: list[str], tmp_path: Path) -> None:
    run("gptq", forget_capture=True)
    before = run("gptq", tasks=task_files[:1], forget_capture=True)
    assert not (tmp_path / "out" / "capture").exists()
    assert asked(before) == [(None, None), ("gptq", 3), ("gptq", 2)]


def test_what_fails_has_a_row_and_is_asked_again(run: Run, task_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("plain", "gptq", widths=(3,))
    quantize = GPTQ.quantize

    def fail(*args: Any) -> Any:
        raise NumericsError("broken by the test")

    monkeypatch.setattr(GPTQ, "quantize", fail)
    done = run("plain", "gptq", widths=(3,), tasks=task_files[:1])
    failed = {row["name"]: row["failed"] for row in done["answers"]}
    assert failed == {None: None, "plain": None, "gptq": "model.layers.0.self_attn.q_proj: broken by the test"}
    monkeypatch.setattr(GPTQ, "quantize", quantize)
    calls = Stages()
    done = run("plain", "gptq", widths=(3,), tasks=task_files[:1], progress=calls)
    assert calls.stages == [f"gptq, 3 bits: {task_files[0]}"]
    assert [row["failed"] for row in done["answers"]] == [None] * 3


def test_what_cannot_be_asked_is_said_before_anything_is_written(run: Run, task_files: list[str], tmp_path: Path) -> None:
    for settings, says in (
        ({"tasks": ["arc-eazy"]}, "unknown task 'arc-eazy'. Did you mean 'arc-easy'"),
        ({"tasks": ["missing.jsonl"]}, r"missing\.jsonl: cannot be read"),
        ({"tasks": task_files[:1] * 2}, "each once"),
        ({"tasks": task_files, "documents": 0}, "documents=0"),
        ({"tasks": task_files, "best": 0}, "best=0"),
    ):
        with pytest.raises(UsageError, match=says):
            run("plain", **settings)
        assert not (tmp_path / "out").exists()


def test_the_best_of_every_width() -> None:
    def row(bits: int | None, stored: float, kl: float, failed: str | None = None) -> dict[str, Any]:
        return {"bits": bits, "bits_per_weight": stored, "kl_mean": kl, "failed": failed}

    rows = {
        Variant("a", 4, build_method(Recipe())): row(4, 4.3, 0.2),
        Variant("b", 4, build_method(Recipe())): row(4, 5.1, 0.1),
        Variant("c", None, build_method(Recipe())): row(None, 4.9, 0.15),
        Variant("d", 2, build_method(Recipe())): row(2, 2.3, 3.0),
        Variant("e", None, build_method(Recipe())): row(None, 0.4, 9.0),
        Variant("f", 4, build_method(Recipe())): {"bits": 4, "failed": "broken"},
    }
    assert [c.name for c in choose_best(rows, 2)] == ["b", "c", "d", "e"]
    assert [c.name for c in choose_best(rows, 9)] == ["b", "c", "a", "d", "e"]
    assert [width_of(rows[c]) for c in choose_best(rows, 1)] == [4, 2, 1]
    assert compare_tasks.choose_best({}, 3) == []
