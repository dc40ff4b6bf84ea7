"""A comparison says of every recipe what `quantize` and `eval` say of it alone, shares what can be shared, and goes on where it stopped."""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints.compressed import MANIFEST_NAME
from bitpress.comparison import run as compare
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.errors import CheckpointError, FormatError, JobStopped, NumericsError, UsageError
from bitpress.measure.evaluation import evaluate
from bitpress.models.walk import LoadedBlock
from bitpress.pipeline.calibration_stream import CalibrationStream, StatisticsVisitor
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.quantizers.gptq import GPTQ
from bitpress.recipes import Calibration

LENGTH, TOKENS = 32, 256

RECIPES = """
plain: {weights: "int{bits}-g16-zero", quantizer: rtn, bits: [4, 3, 2]}
gptq: {weights: "int{bits}-g16-zero", quantizer: gptq}
awq: {weights: int4-g16-zero, quantizer: awq}
rotated: {weights: int3-g16-zero, transforms: [hadamard], corrections: [{name: lqer, rank: 2}]}
follows: {weights: int3-g16-zero, quantizer: gptq, calibration: {inputs: pressed}}
both: {weights: int3-g16-zero, quantizer: gptaq}
longer: {weights: int3-g16-zero, quantizer: gptq, calibration: {samples: 6}}
felt: {weights: kmeans2-row, quantizer: squeezellm}
heads: {weights: int3-g16-zero, quantizer: boa}
learned: {weights: int3-g16-zero, quantizer: rtn, tuning: [{name: parameters, steps: 3, batch: 3}]}
"""


class Calls:
    """Counts what a run does, and stops it after so many units of a kind; judging a recipe counts as a part of it."""

    def __init__(self, stop_after: tuple[str, int] | None = None) -> None:
        self.stop_after = stop_after
        self.stages: list[str] = []
        self.units: dict[str, int] = {}

    def begin(self, what: str, total: int, done: int = 0) -> None:
        if what not in [f"{stage}, judged" for stage in self.stages[-1:]]:
            self.stages.append(what)

    def advance(self, unit: str, **figures: Any) -> None:
        stage = self.stages[-1]
        self.units[stage] = self.units.get(stage, 0) + 1
        if self.stop_after == (stage, self.units[stage]):
            raise JobStopped("stopped by the test")

    def note(self, text: str) -> None:
        pass


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    path = tmp_path / "recipes.yaml"
    path.write_text(RECIPES)
    return path


@pytest.fixture
def calibration(text_file: Path) -> dict[str, Any]:
    return {"text": str(text_file), "samples": 4, "length": LENGTH}


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny_model: Callable[..., Path], recipes: Path, calibration: dict[str, Any], tmp_path: Path) -> Run:
    """Compare some recipes of the file on a tiny llama in float32."""

    def go(*names: str, widths: Sequence[int] = (3,), model: Path | None = None, **settings: Any) -> dict[str, Any]:
        made, _ = read_candidates(recipes, widths, calibration, compute="fp32", only=names)
        shared = Calibration(**{"inputs": "original", **calibration})
        settings = {"tokens": TOKENS, "length": LENGTH, "shared": shared} | settings
        return compare_recipes(model or tiny_model(), settings.pop("out", tmp_path / "out"), made, **settings)

    return go


def names(done: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(row["name"], row["bits"]) for row in done["rows"]]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mixtral", marks=pytest.mark.release)])
def test_rows_are_what_eval_says_of_the_pressed_directory(
    architecture: str, run: Run, tiny_model: Callable[..., Path], recipes: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(architecture, dtype="bfloat16")
    chosen = ["plain", "gptq", "awq", "follows", "both", "longer"] + ["rotated", "felt", "heads", "learned"] * (
        architecture == "llama"
    )
    done = run(*chosen, model=model, keep=True)
    assert [row["failed"] for row in done["rows"]] == [None] * len(chosen)
    made, _ = read_candidates(recipes, [3], calibration, compute="fp32", only=chosen)
    checked: list[str] = []
    for row, candidate in zip(done["rows"], made, strict=True):
        alone = tmp_path / f"alone-{candidate.name}"
        report = quantize_directory(model, alone, candidate.recipe, proof=Proof(tokens=0))
        # The first on every text, each of the others on one of them, taken in turn.
        turn = len(checked) % len(compare.HELDOUT)
        for name, text in list(compare.HELDOUT.items())[turn : turn + 1 if checked else None]:
            figures = evaluate(alone, model, text=text, tokens=TOKENS, length=LENGTH)
            assert {key: figures[key] for key in row["texts"][name]} == row["texts"][name], (candidate.label, name)
            assert row["texts"][name]["kl_mean"] > 0
        checked.append(candidate.name)
        assert row["bits_per_weight"] == figures["bits_per_weight"]
        assert row["fallbacks"] == len(report["fallbacks"])
        assert row.get("learned", {}).get("spans", 0) == len(report.get("tuned", ()))
        if candidate.name != "plain":
            assert row["error"] == pytest.approx(sum(layer["error"] for layer in report["layers"]) / len(report["layers"]))
        kept = (
            tmp_path / "out" / "models" / (candidate.name if candidate.bits is None else f"{candidate.name}-{candidate.bits}")
        )
        assert (kept / MANIFEST_NAME).read_bytes() == (alone / MANIFEST_NAME).read_bytes(), candidate.label


def test_one_pass_serves_every_recipe_that_follows_the_original(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    captured, measured = CalibrationStream.capture_, StatisticsVisitor.visit_

    def capture(self: CalibrationStream, *args: Any, **kwargs: Any) -> Any:
        passes.append("capture")
        return captured(self, *args, **kwargs)

    def measure(self: StatisticsVisitor, block: LoadedBlock) -> None:
        passes.append("shared")
        measured(self, block)

    monkeypatch.setattr(CalibrationStream, "capture_", capture)
    monkeypatch.setattr(StatisticsVisitor, "visit_", measure)
    done = run("plain", "gptq", "awq", "rotated", "heads")
    assert passes == ["shared", "capture"] * 2, "both blocks once, whatever the recipes"
    assert {row["measured_on"] for row in done["rows"]} == {"output"}, "rounding too is told by the layer's output"
    assert done["rows"][0]["inputs"] is None
    passes.clear()
    run("follows")
    assert passes == ["capture"] * 2, "its own forward passes"


def test_errors_tell_of_the_output_although_rounding_needs_no_statistics(run: Run) -> None:
    plain, gptq = run("plain", "gptq")["rows"]
    assert plain["error"] == pytest.approx(plain["error_rounded"])
    assert gptq["error_rounded"] == pytest.approx(plain["error"]), "the same yardstick"
    assert gptq["error"] < 0.9 * plain["error"]


def test_rows_say_what_the_shared_pass_took(run: Run) -> None:
    took = {row["name"]: row["seconds_capture"] for row in run("plain", "follows", "gptq", "awq")["rows"]}
    assert took["plain"] == took["follows"] == 0, "no statistics, or those of its own forward passes"
    assert took["gptq"] == took["awq"] > 0


def test_nothing_is_calibrated_where_nothing_needs_it(run: Run, tmp_path: Path) -> None:
    calls = Calls()
    (row,) = run("plain", progress=calls)["rows"]
    assert row["measured_on"] == "weight"
    assert "statistics of the original" not in calls.stages


def test_a_run_goes_on_after_what_is_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(JobStopped):
        run("plain", "gptq", "awq", progress=Calls(("awq", 1)))
    heard: list[str] = []
    calls = Calls()
    done = run("plain", "gptq", "awq", progress=calls, note_row=lambda row: heard.append(row["name"]))
    assert calls.stages == ["awq"], "the original is not run again, nor what is done"
    assert heard == [name for name, _ in names(done)] == ["plain", "gptq", "awq"]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, "plain", "gptq", "awq"]
    fresh = run("plain", "gptq", "awq", out=tmp_path / "other")
    for row, again in zip(done["rows"], fresh["rows"], strict=True):
        assert row["texts"] == again["texts"]
        assert row["error"] == again["error"]


@pytest.mark.parametrize("stage", ["original on the evaluation texts", "statistics of the original"])
def test_a_pass_that_is_stopped_goes_on(stage: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(JobStopped):
        run("gptq", "heads", progress=Calls((stage, 1)))
    calls = Calls()
    done = run("gptq", "heads", progress=calls)
    assert calls.units["statistics of the original"] == (1 if stage.startswith("statistics") else 2)
    fresh = run("gptq", "heads", out=tmp_path / "other")
    assert [row["texts"] for row in done["rows"]] == [row["texts"] for row in fresh["rows"]]


def test_a_capture_is_used_as_long_as_it_has_what_is_needed(run: Run, tmp_path: Path) -> None:
    run("gptq", "heads")
    for chosen in (("awq", "plain"), ("plain",)):
        calls = Calls()
        run(*chosen, widths=(2, 3), progress=calls)
        assert ("statistics of the original" in calls.stages) == (chosen[0] == "awq"), "mean_abs was not there"
    calls = Calls()
    run("gptq", widths=(2, 3), progress=calls, forget_capture=True)
    assert calls.stages == ["gptq, 2 bits"]
    assert not (tmp_path / "out" / "capture").exists()
    calls = Calls()
    run("gptq", widths=(2, 3), progress=calls)
    assert calls.stages == [], "all is done, and nothing is needed"


def test_a_damaged_capture_is_made_again(run: Run, tmp_path: Path) -> None:
    first = run("gptq")
    block = next((tmp_path / "out" / "capture").rglob("block-00001.safetensors"))
    block.write_bytes(block.read_bytes()[:-1] + b"\x01")
    calls = Calls()
    second = run("gptq", widths=(3, 4), progress=calls)
    assert calls.units["statistics of the original"] == 2
    assert second["rows"][0] == first["rows"][0]


def test_a_recipe_that_changed_is_run_again(run: Run, recipes: Path) -> None:
    before = run("gptq", "plain")["rows"]
    recipes.write_text(RECIPES.replace('gptq: {weights: "int{bits}-g16-zero"', 'gptq: {weights: "int{bits}-g32-zero"'))
    calls = Calls()
    after = run("gptq", "plain", progress=calls)["rows"]
    assert calls.stages == ["gptq, 3 bits"]
    assert after[1]["bits_per_weight"] < before[1]["bits_per_weight"]
    recipes.write_text(RECIPES)
    calls = Calls()
    assert run("gptq", "plain", progress=calls)["rows"] == before
    assert calls.stages == [], "its row is still there"


def test_a_method_that_was_worked_on_is_run_again(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("gptq", "plain")
    changed = tmp_path / "gptq.py"
    changed.write_text("other code")
    where = inspect.getsourcefile
    monkeypatch.setattr(inspect, "getsourcefile", lambda kind: str(changed) if kind is GPTQ else where(kind))
    calls = Calls()
    run("gptq", "plain", progress=calls)
    assert calls.stages == ["gptq, 3 bits"]


def test_a_torn_line_has_not_happened(run: Run, tmp_path: Path) -> None:
    run("plain", "gptq")
    rows = tmp_path / "out" / "results.jsonl"
    rows.write_bytes(rows.read_bytes()[:-20])
    calls = Calls()
    done = run("plain", "gptq", progress=calls)
    assert calls.stages == ["gptq, 3 bits"]
    assert names(done) == [("plain", 3), ("gptq", 3)]
    rows.write_text("nonsense\n" + rows.read_text())
    with pytest.raises(CheckpointError, match=r"results\.jsonl:1: is not JSON"):
        run("plain", "gptq")


def test_a_recipe_that_fails_has_a_row_and_stops_nobody(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quantize = GPTQ.quantize
    broken = [NumericsError("broken by the test"), IndexError("broken by the test")]

    def fail(self: GPTQ, w: torch.Tensor, *args: Any) -> Any:
        raise broken[0]

    monkeypatch.setattr(GPTQ, "quantize", fail)
    fine, failed = run("gptq", "plain")["rows"]
    assert failed["failed"] == "model.layers.0.self_attn.q_proj: broken by the test"
    assert "texts" not in failed
    assert fine["failed"] is None
    run("gptq", "plain", forget_capture=True)
    assert (tmp_path / "out" / "capture").is_dir(), "what failed will need it again"
    broken.pop(0)
    _, failed = run("gptq", "plain")["rows"]
    assert failed["failed"].startswith("IndexError: broken by the test (test_run.py:")
    monkeypatch.setattr(GPTQ, "quantize", quantize)
    calls = Calls()
    done = run("gptq", "plain", progress=calls)
    assert calls.stages == ["gptq, 3 bits"], "what failed is tried again"
    assert [row["failed"] for row in done["rows"]] == [None, None]


def test_noise_of_the_arithmetic(run: Run, recipes: Path, calibration: dict[str, Any], tiny_model: Any, tmp_path: Path) -> None:
    assert run("plain")["floor"]["texts"] is None, "float32 is what others are compared with"
    made, _ = read_candidates(recipes, [3], calibration, compute="bf16", only=["plain"])
    done = compare_recipes(tiny_model(), tmp_path / "bf16", made, tokens=TOKENS, length=LENGTH)
    assert done["compute"] == "bf16"
    assert 0 < done["floor"]["kl_mean"] < 0.01 * done["rows"][0]["kl_mean"]
    assert set(done["floor"]["texts"]) == set(compare.HELDOUT)


def test_what_cannot_work_is_said_before_anything_is_written(
    run: Run, recipes: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    def refused(kind: type[Exception], match: str, *chosen: str, **settings: Any) -> None:
        with pytest.raises(kind, match=match):
            run(*chosen, **settings)
        assert not (tmp_path / "out").exists()

    recipes.write_text("a: {weights: int4-g48}\nb: {weights: int4-g16, quantizer: higgs}\nc: {weights: int4-g16}\n")
    refused(FormatError, "^a: int4-g48", "a")
    refused(FormatError, "^b: higgs serves", "b")
    refused(UsageError, "speeches: .* is the calibration text of c", "c", texts={"speeches": calibration["text"]})
    refused(Exception, r"missing\.txt", "c", texts={"mine": "missing.txt"})


def test_out_must_be_a_comparison_of_the_same_things(run: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else than a comparison"):
        run("plain")
    shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        run("plain")
    out.unlink()
    run("plain")
    with pytest.raises(UsageError, match=r"differs in texts\.reference; texts\.speeches"):
        run("plain", tokens=TOKENS * 2)
    with pytest.raises(UsageError, match="differs in source"):
        run("plain", model=tiny_model("llama", seed=1))


def test_one_process_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(row: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="another process is comparing here"):
            run("plain")

    run("plain", note_row=meanwhile)


def test_two_candidates_of_one_name_are_refused(
    tiny_model: Callable[..., Path], run: Run, recipes: Path, tmp_path: Path
) -> None:
    (made,), _ = read_candidates(recipes, [3], only=["plain"])
    with pytest.raises(UsageError, match="a name of its own"):
        compare_recipes(tiny_model(), tmp_path / "out", [made, Variant("plain", 3, made.method)])
