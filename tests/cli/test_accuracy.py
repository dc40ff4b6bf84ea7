"""Tasks on the command line: what `eval` and `compare` print of them, and every refusal in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitpress as package
from bitpress.cli.accuracy import accuracy_line, accuracy_rows, by_recipe, parse_tasks, percent
from bitpress.cli.compare import comparison_lines, told_answers
from bitpress.errors import UsageError

ROWS = [{"context": "The ship sailed to the ", "choices": ["sea", "island of no name"], "answer": k % 2} for k in range(6)]
RECIPES = "rtn: {weights: 'int{bits}-g16-zero', quantizer: rtn, bits: [4, 3]}\ngptq: {weights: 'int{bits}-g16-zero'}\n"


Run = Callable[..., Any]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_eval_prints_tasks_alone_and_beside_the_distance(
    bitpress: Run, tiny_model: Callable[..., Path], pressed_original: Path, task: Path
) -> None:
    original = tiny_model("llama", tie_word_embeddings=True)
    done = bitpress("eval", pressed_original, "--tasks", task)
    assert done.code == 0, done.err
    assert "50.0 ± 22.4 %, by length 50.0 ± 22.4 %, 6 questions" in done.out, "every other answer is the other choice"
    assert "KL" not in done.out
    assert "perplexity" not in done.out, "only what was asked for is measured"
    assert "answering" in done.err
    done = bitpress("eval", pressed_original, "--tasks", task, "--tokens", 128, "--length", 32)
    assert "perplexity" in done.out
    against = ("--against", original, "--tokens", 128, "--length", 32)
    done = bitpress("eval", pressed_original, "--tasks", task, "--documents", 5, *against)
    assert "KL divergence from the original" in done.out
    assert "5 questions (original " in done.out
    found = json.loads(bitpress("eval", pressed_original, "--tasks", task, *against, "--json").out)
    assert found["kl_mean"] > 0
    assert found["tasks"][str(task)]["documents"] == found["tasks_original"][str(task)]["documents"] == 6
    assert package.evaluate_tasks(pressed_original, [str(task)]) == found["tasks"]


def test_eval_alone_gives_the_perplexity_that_it_gives_beside_an_original(
    bitpress: Run, tiny_model: Callable[..., Path], pressed_original: Path
) -> None:
    original = tiny_model("llama", tie_word_embeddings=True)
    how = ("--tokens", 256, "--length", 32)
    both = bitpress("eval", pressed_original, "--against", original, *how, "--json").json
    alone = bitpress("eval", pressed_original, *how, "--json").json
    assert alone["perplexity"] == pytest.approx(both["perplexity"], rel=1e-6)
    assert alone["perplexity_low"] < alone["perplexity"] < alone["perplexity_high"]
    assert (alone["tokens"], alone["windows"], alone["bytes"]) == (256, 8, both["bytes"])
    plain = bitpress("eval", original, *how, "--json").json
    assert plain["perplexity"] == pytest.approx(both["perplexity_original"], rel=1e-6)
    assert plain["bytes"] is None
    single = bitpress("eval", pressed_original, "--tokens", 32, "--length", 32)
    assert single.code == 0, single.err
    assert "95 %" not in single.out
    printed = bitpress("eval", pressed_original, *how).out
    assert f"{alone['perplexity']:.3f} (95 %: {alone['perplexity_low']:.3f} to" in printed
    found = package.evaluate(pressed_original, tokens=256, length=32)
    assert found["perplexity"] == alone["perplexity"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tasks", "piqua"), "unknown task 'piqua'. Did you mean 'piqa'? A task is one of arc-easy,"),
        (("--tasks", "piqa,"), "--tasks 'piqa,': write names separated by commas, each once"),
        (("--tasks", "piqa,piqa"), "each once"),
        (("--tasks", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("--against", "MODEL", "--documents", 9), "--documents needs --tasks"),
    ],
)
def test_eval_refuses_in_one_line(
    options: tuple[object, ...], says: str, bitpress: Run, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    done = bitpress("eval", model, *(model if word == "MODEL" else word for word in options))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ")
    assert says in done.err.splitlines()[-1]
    assert done.out == ""


def test_compare_has_tasks_in_table_page_and_json(
    bitpress: Run, tiny_model: Callable[..., Path], text_file: Path, task: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipes.yaml").write_text(RECIPES)
    out = tmp_path / "out"
    command = ["compare", tiny_model(), out, "--recipes", tmp_path / "recipes.yaml", "--bits", "4,3", "--tokens", 128]
    command += ["--compute", "fp32", "--calibration", text_file, "--samples", 4, "--length", 32]
    refused = bitpress(*command, "--best", 1)
    assert (refused.code, "--best needs --tasks" in refused.err) == (2, True)
    done = bitpress(*command, "--tasks", task, "--best", 1)
    assert done.code == 0, done.err
    head, *lines = [line for line in done.out.splitlines() if line.strip()]
    assert "own.jsonl" in head
    assert sum("± 22.4" in line for line in lines[:4]) == 2, "one recipe of each of two widths"
    assert f"{task}: % of 6 questions right, ± one standard error; the original: 50.0 ± 22.4 %." in done.out
    assert f"original, {task}: 50.0 ± 22.4 % of 6 right" in done.err.splitlines()
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count("50.0 ± 22.4") >= 3
    assert "Original: " in page
    found = json.loads(bitpress(*command, "--tasks", task, "--best", 1, "--json").out)
    assert found["tasks"] == {str(task): 6}
    assert [row["kind"] for row in found["answers"]] == ["tasks"] * 3
    assert "own.jsonl" not in bitpress(*command).out


def answer(name: str | None, bits: int | None, acc: float, failed: str | None = None) -> dict[str, object]:
    figures = {"acc": acc, "acc_stderr": 0.02, "acc_norm": 0.25, "acc_norm_stderr": None, "documents": 500}
    return {"kind": "tasks", "name": name, "bits": bits, "task": "t", "failed": failed} | ({} if failed else figures)


def test_how_figures_are_said() -> None:
    row = answer("gptq", 4, 0.493)
    assert percent(row, "acc") == "49.3 ± 2.0"
    assert percent(row, "acc_norm") == "25.0"
    assert accuracy_line(row) == "49.3 ± 2.0 %, by length 25.0 %, 500 questions"
    assert accuracy_rows({"tasks": {"t": row}, "tasks_original": {"t": answer(None, None, 0.6)}}) == {
        "t": "49.3 ± 2.0 %, by length 25.0 %, 500 questions (original 60.0 ± 2.0 %, 25.0 %)"
    }
    assert accuracy_rows({}) == {}
    assert told_answers(row) == "gptq, 4 bits, t: 49.3 ± 2.0 % of 500 right"
    assert told_answers(answer(None, None, 0.5, "broken")) == "original, t: failed: broken"
    answers = [answer(None, None, 0.6), row, answer("rtn", 4, 0.3, "broken")]
    assert by_recipe(answers) == {(None, None): {"t": answers[0]}, ("gptq", 4): {"t": row}}


def test_cells_of_recipes_that_were_not_asked_are_empty() -> None:
    figures = {"kl_mean": 0.1, "kl_ci95": None, "top1_agreement": 0.5}
    shared = {"failed": None, "bits": 4, "bits_per_weight": 4.3, "kl_mean": 0.1, "texts": {"x": figures}, "error": 0.1}
    shared |= {"seconds_pressing": 1.0, "seconds_measuring": 1.0, "peak_memory_bytes": 1e6, "fallbacks": 0}
    rows = [{"name": "gptq", **shared}, {"name": "rtn", **shared}]
    one, two = comparison_lines(rows, ["x"], ["t", "u"], [answer("gptq", 4, 0.493)])
    assert one[3:6] == ("50.0 %", "49.3 ± 2.0", "")
    assert two[3:6] == ("50.0 %", "", "")


def test_names_of_tasks() -> None:
    assert parse_tasks(None) == []
    assert parse_tasks("arc-easy, piqa") == ["arc-easy", "piqa"]
    for wrong in ("", ",", "a,,b", "a,a"):
        with pytest.raises(UsageError, match="--tasks"):
            parse_tasks(wrong)
