"""Errors on held-out tokens, by class: what a few massive tokens hide in the error over all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.calibration.held_out import MASSIVE, HeldOut
from bitpress.cli.reports import show_report
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.pipeline.records import TokenErrors
from bitpress.pipeline.token_errors import FAR, far_classes, measure_classes, note_ordinary, token_errors

WINDOWS, POSITIONS = 4, 32


def made_up() -> tuple[HeldOut, torch.Tensor, list[torch.Tensor]]:
    """Two windows of 8 tokens: the first ones are large, as is one in the middle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=generator)
    x[[0, 8, 5]] *= 100
    w = torch.randn(4, 6, generator=generator)
    first = torch.zeros(16, dtype=torch.bool)
    first[::8] = True
    return HeldOut(x, first), w, [w + 0.1 * torch.randn(4, 6, generator=generator) for _ in range(2)]


def test_every_class_is_compared_with_its_own_outputs() -> None:
    held_out, w, candidates = made_up()
    found = token_errors([measure_classes(w, candidates, held_out)])
    assert found is not None
    members = {"first": [0, 8], "massive": [5], "others": [i for i in range(16) if i not in (0, 5, 8)], "all": list(range(16))}
    assert {name: errors.tokens for name, errors in found.items()} == {name: len(rows) for name, rows in members.items()}
    for name, rows in members.items():
        outputs, *errors = (held_out.x[rows].double() @ m.double().T for m in (w, *(w - c for c in candidates)))
        rounded, compressed = (float(e.square().sum() / outputs.square().sum()) for e in errors)
        # Sums of 24 products in float32, and differences of weights whose error is a tenth of them.
        assert found[name].error_rounded == pytest.approx(rounded, rel=1e-4)
        assert found[name].error == pytest.approx(compressed, rel=1e-4)


def test_matrices_of_a_weight_are_summed() -> None:
    held_out, w, candidates = made_up()
    none = HeldOut(held_out.x[:0], held_out.first[:0])
    one = measure_classes(w, candidates, held_out)
    assert measure_classes(w, candidates, none) == {}
    assert token_errors([one, {}, one]) == {
        name: errors.model_copy(update={"tokens": 2 * errors.tokens}) for name, errors in (token_errors([one]) or {}).items()
    }
    assert token_errors([{}]) is None


def test_squares_beyond_float32_are_left_out() -> None:
    held_out, w, candidates = made_up()
    assert measure_classes(w * 1e30, candidates, held_out) == {}


def massive_model(tiny_model: Callable[..., Path], root: Path) -> Path:
    """A GPT-2 whose first position lights up every feed-forward layer, each unit in its own way, thousands of times as far as any token."""
    shutil.copytree(tiny_model("gpt2"), root)
    tensors = load_file(root / "model.safetensors")
    channel = 5
    tensors["transformer.wpe.weight"][:, channel] = 0.0
    tensors["transformer.wpe.weight"][0, channel] = 100.0
    tensors["transformer.wte.weight"][:, channel] = 0.0
    for name, tensor in tensors.items():
        if name.endswith("mlp.c_fc.weight"):
            tensor[channel] = 50 * torch.rand(tensor.shape[1], generator=torch.Generator().manual_seed(2))
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def massive(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("massive")
    recipe = gptq_recipe(calibration={"samples": 100, "length": POSITIONS}, batch=8)
    model = massive_model(tiny_model, root / "model")
    return quantize_directory(model, root / "out", recipe, proof=Proof(tokens=0)), root / "out"


def test_a_massive_first_token_hides_what_the_others_suffer(massive: tuple[dict[str, Any], Path]) -> None:
    report, _ = massive
    far = report["held_out"]["weights_far"]
    assert report["held_out"] == {"weights_far": far, "samples": WINDOWS, "massive_above": MASSIVE, "far_above": FAR}
    notes = [note for row in report["layers"] for note in row["notes"] if "held-out text" in note]
    assert 0 < far["others"] == len(notes)
    row = next(row for row in report["layers"] if row["name"].endswith("h.0.mlp.c_proj"))
    errors = row["held_out"]
    assert errors["first"]["tokens"] == WINDOWS
    assert errors["all"]["tokens"] == WINDOWS * POSITIONS
    assert sum(errors[name]["tokens"] for name in errors if name != "all") == WINDOWS * POSITIONS
    assert errors["all"]["error"] == pytest.approx(row["error"], rel=0.5), "both are those of the first tokens"
    assert errors["first"]["error"] <= errors["all"]["error"]
    assert errors["others"]["error"] > 100 * errors["all"]["error"]
    assert any(note.startswith("ordinary tokens have an error of") for note in row["notes"])
    others = [row for row in report["layers"] if "mlp" not in row["name"]]
    assert not any("held-out text" in note for row in others for note in row["notes"])


def test_the_report_and_the_card_show_it(massive: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    report, out = massive
    show_report(report, out)
    shown = capsys.readouterr().out
    assert "ordinary tokens in 4 held-out windows" in shown
    assert "Errors above 4 times that of all tokens: ordinary tokens in" in shown
    row = max(report["layers"], key=lambda row: row["held_out"]["others"]["error"])
    assert {"first", "others", "all"} <= set(row["held_out"])
    figures = [f"{row['held_out'][n]['error']:.4g}" for n in ("others", "massive", "first", "all") if n in row["held_out"]]
    assert any(line.split() == [row["name"], *figures] for line in shown.splitlines())
    card = (out / "README.md").read_text()
    cells = [
        f"{row['held_out'][n]['error']:.3g}" if n in row["held_out"] else "" for n in ("all", "first", "massive", "others")
    ]
    assert f"| {' | '.join(cells)} |\n" in card


def test_no_statistics_nothing_held_out(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    report = quantize_directory(
        tiny_model("gpt2"), tmp_path / "out", gptq_recipe(quantizer={"name": "rtn"}), proof=Proof(tokens=0)
    )
    assert report["held_out"] is None
    assert {row["held_out"] for row in report["layers"]} == {None}
    assert "held out" not in (tmp_path / "out" / "README.md").read_text()


def test_of_experts_no_position_is_known(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    report = quantize_directory(
        tiny_model("mixtral"), tmp_path / "out", gptq_recipe(min_expert_tokens=1), proof=Proof(tokens=0)
    )
    experts = [row for row in report["layers"] if isinstance(row["tokens"], list)]
    assert experts
    for row in experts:
        assert set(row["held_out"]) == {"all", "others"}
        assert 0 < row["held_out"]["all"]["tokens"] <= POSITIONS * 2, "every token goes to two experts"
    attention = [row for row in report["layers"] if "self_attn" in row["name"]]
    assert {row["held_out"]["first"]["tokens"] for row in attention} == {1}


def test_only_far_ordinary_tokens_are_noted() -> None:
    held_out, w, candidates = made_up()
    errors = token_errors([measure_classes(w, candidates, held_out)])
    assert errors is not None
    assert note_ordinary(errors) == note_ordinary(None) == far_classes(errors) == far_classes(None) == []
    whole = errors["all"].error

    def moved(name: str, factor: float) -> dict[str, TokenErrors]:
        return errors | {name: errors[name].model_copy(update={"error": factor * FAR * whole, "error_rounded": whole})}

    assert far_classes(moved("massive", 1.01)) == ["massive"]
    assert note_ordinary(moved("massive", 1.01)) == []
    assert note_ordinary(moved("others", 0.99)) == []
    assert "more than plain rounding's" in note_ordinary(moved("others", 1.01))[0]
