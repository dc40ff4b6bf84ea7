"""Rotations of the whole network that are learned: the file that is written is the basis that was learned in, and the start is never given up
for a worse one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.errors import CheckpointError, UsageError
from bitpress.models.opening import open_original
from bitpress.pipeline.learned_rotations import _Learner, learn_rotations
from bitpress.progress import Silent
from bitpress.recipes import build_method, make_recipe
from bitpress.transforms.rotate import Rotate
from bitpress.tuning.network_rotations import RotationTuning

CPU = torch.device("cpu")
FORMATS = {"weights": "int4-row", "quantizer": "rtn", "inputs": "int4-row-fp32", "embeddings": "keep", "head": "keep"}


@pytest.fixture(scope="module")
def method(text_file: Path) -> Callable[..., Any]:
    def make(**values: Any) -> Any:
        calibration = {"text": str(text_file), "samples": 4, "length": 32}
        return build_method(make_recipe({**FORMATS, "calibration": calibration, "batch": 2} | values))

    return make


def tuning(**values: Any) -> RotationTuning:
    return RotationTuning(**{"steps": 12, "batch": 2, **values})


@pytest.fixture(scope="module")
def planted(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one large channel in its residual stream, and no rotation in a file beside it: every turn away from that is better."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(tiny_model("llama"), folder / "model")
    held = load_file(folder / "model" / "model.safetensors")
    held["model.embed_tokens.weight"][:, 3] *= 30
    width, heads = held["model.embed_tokens.weight"].shape[1], 16
    save_file(held, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    save_file({"residual": torch.eye(width), "values": torch.eye(heads)}, folder / "none.safetensors")
    return folder / "model"


def unturned(planted: Path, **settings: Any) -> dict[str, Any]:
    return {"name": "rotate", "kind": "given", "tensors": str(planted.parent / "none.safetensors"), **settings}


@pytest.mark.parametrize("settings", [{}, {"residual": False}])
def test_the_file_is_the_basis_that_was_learned_in(
    settings: dict[str, Any],
    method: Callable[..., Any],
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rotate, file = unturned(planted, **settings), tmp_path / "r.safetensors"
    online = {"name": "hadamard", "outputs": True}
    given, how = method(transforms=[rotate, online]), tuning()
    learner = _Learner(planted, given, how, CPU, Silent())
    parameters: dict[str, Any] = {}
    make = learner._parameters

    def kept(check_stop: Callable[[], None]) -> Any:
        parameters.update(made := make(check_stop))
        return made

    monkeypatch.setattr(learner, "_parameters", kept)
    curve = learner.learn(lambda: None)
    assert curve.better
    assert settings or curve.after < 0.8 * curve.before
    told = learn_rotations(planted, file, given, how)
    assert (told.held_out_before, told.held_out_after) == (curve.before, curve.after)
    held = load_file(file)
    assert set(held) == {"values.0", "values.1", *(["residual"] if settings.get("residual", True) else [])}
    for name, matrix in held.items():
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
        assert torch.equal(matrix, learner.result()[name]), "the same seed gives the same file"
    turned = Rotate(kind="given", residual=settings.get("residual", True), tensors=str(file))
    streamed, _ = open_original(planted, torch.float32, turned)
    for i in range(2):
        for name, stored in streamed.load_block_(i).items():
            if name in parameters:
                torch.testing.assert_close(parameters[name].harden(), stored, rtol=0, atol=1e-5)


def test_inputs_or_weights_alone_are_rounded(method: Callable[..., Any], planted: Path, tmp_path: Path) -> None:
    given = method(transforms=[unturned(planted)])
    found = {
        rounds: learn_rotations(planted, tmp_path / rounds, given, tuning(rounds=rounds))
        for rounds in ("all", "inputs", "weights")
    }
    assert found["inputs"].held_out_after < 0.8 * found["inputs"].held_out_before
    alone = [found[rounds].held_out_before for rounds in ("inputs", "weights")]
    assert 0 < max(alone) < found["all"].held_out_before < 2 * sum(alone)


def test_batches_of_any_size_run(method: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Steps of 3 windows where the recipe runs 2 together; without a teacher nothing has run windows before."""
    told = learn_rotations(tiny_model("llama"), tmp_path / "r", method(), tuning(steps=1, batch=3, loss="cross-entropy"))
    assert told.failed is None
    assert told.steps == 1


@pytest.mark.parametrize(
    ("architecture", "side"), [("gpt2", {"residual": False}), ("llama", {"values": False}), ("llama", {"residual": False})]
)
def test_a_recipe_is_told_how_to_take_the_file(
    architecture: str, side: dict[str, bool], method: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    start = {"name": "rotate", **side}
    model = tiny_model(architecture)
    told = learn_rotations(model, tmp_path / "r", method(transforms=[start]), tuning(steps=2))
    assert told.rotate == {"name": "rotate", "kind": "given", "tensors": str(tmp_path / "r"), **side}
    turned = method(transforms=[told.rotate]).rotate
    assert turned is not None
    plain, ours = (open_original(model, torch.float32, rotate)[0].load_block_(0) for rotate in (None, turned))
    moved = {name for name, w in plain.items() if not torch.equal(w, ours[name])}
    assert moved, "the file turns the network"
    for name in moved:  # lengths stay, but where a norm's gain went in
        if "v_proj" in name and "residual" in side:
            torch.testing.assert_close(ours[name].norm(), plain[name].norm(), rtol=1e-5, atol=0)


def test_parts_that_are_left_out_are_named(method: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    class Noted(Silent):
        def __init__(self) -> None:
            self.texts = list[str]()

        def note(self, text: str) -> None:
            self.texts.append(text)

    heard = Noted()
    recipe = {"transforms": ["smoothquant", "hadamard"], "keys": "int8-row-fp32", "embeddings": "int8-row"}
    learn_rotations(tiny_model("llama"), tmp_path / "r", method(**recipe), tuning(steps=1), progress=heard)
    assert heard.texts == ["left out while rotations are learned: smoothquant, keys, the format of embeddings"]


def test_the_start_stays_where_nothing_is_better(
    method: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "r"
    told = learn_rotations(tiny_model("llama"), file, method(), tuning(steps=1, rate=1e-30))
    assert not told.kept
    assert told.held_out_after == told.held_out_before
    width = load_file(file)["residual"].shape[0]
    start = Rotate().of_residual(width, centred=False).apply(torch.eye(width)).T.float()
    torch.testing.assert_close(load_file(file)["residual"], start, rtol=0, atol=1e-6)


def test_what_cannot_be_learned_is_said(
    method: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    model, file = tiny_model("llama"), tmp_path / "r.safetensors"
    short = tmp_path / "one-window.txt"
    short.write_text(text_file.read_text(encoding="utf-8")[:60], encoding="utf-8")
    file.write_bytes(b"mine")
    for given, out, says in (
        (method(), file, "exists already"),
        (method(), tmp_path, "is a directory"),
        (method(), tmp_path / "none" / "r", "does not exist"),
        (method(), model / "r", "model's own directory"),
        (method(inputs=None), tmp_path / "r", "nothing is rounded"),
        (method(inputs={"format": "int8-tensor", "parameters": "static"}), tmp_path / "r", "dynamic"),
        (method(calibration={"text": str(short), "samples": 1, "length": 32}), tmp_path / "r", "samples 2 or more"),
    ):
        with pytest.raises(UsageError, match=says):
            learn_rotations(model, out, given, tuning(rounds="inputs"))
    assert file.read_bytes() == b"mine"
    with pytest.raises(CheckpointError, match="residual: false"):
        learn_rotations(tiny_model("gpt2"), tmp_path / "r", method(), tuning())
    assert {*tmp_path.iterdir()} == {file, short}
    for wrong in ({"span": "block", "loss": "mse"}, {"norms": 0.1}):
        with pytest.raises(UsageError, match="whole network"):
            tuning(**wrong)
    with pytest.raises(UsageError, match="nothing is rounded"):
        learn_rotations(model, tmp_path / "r", method(inputs=None, weights="dfloat11"), tuning())
    with pytest.raises(UsageError, match="all, inputs or weights"):
        tuning(rounds="none")
