"""Models that are sick but legal: dead channels by design, weights beyond half precision, logits that make a figure infinite."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.checkpoints.compressed import MANIFEST_NAME
from bitpress.errors import NumericsError
from bitpress.evaluation import distance
from bitpress.pipeline.blocks import BlockCompressor
from bitpress.pipeline.quantize import Proof, quantize_directory

State = dict[str, torch.Tensor]


def changed(model: Path, copy: Path, change: Callable[[State], None]) -> Path:
    """Copy a tiny model and change its tensors."""
    shutil.copytree(model, copy)
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


# ------------------------------------------------------------------------------------------------------------ dead channels


def test_dead_channels_are_a_note(tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path) -> None:
    def kill(state: State) -> None:  # a norm of Gemma multiplies by 1 + weight
        state["model.layers.0.input_layernorm.weight"][3:7] = -1.0
        state["model.layers.1.pre_feedforward_layernorm.weight"][0] = -1.0

    model = changed(tiny_model("gemma3"), tmp_path / "model", kill)
    report = quantize_directory(model, tmp_path / "out", gptq_recipe(), strict=True, proof=Proof(tokens=0))
    assert report["fallbacks"] == []
    assert report["calibrated"] == {"weights": 14, "of": 14}
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"] + [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")]
    counts = dict.fromkeys(names[:3], 4) | dict.fromkeys(names[3:], 1)
    assert {note["weight"]: note["what"] for note in report["notes"]} == {
        name: f"{count} of 32 input channels were always zero" for name, count in counts.items()
    }


# ------------------------------------------------------------------------------------------------------------ loss of range


@pytest.mark.parametrize("factor", [1e-8, pytest.param(1e8, marks=pytest.mark.release)])
def test_weights_beyond_half_precision_get_wider_scales(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, factor: float
) -> None:
    """The same function: a norm's weight divided, the products behind it multiplied."""
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]

    def rescale(state: State) -> None:
        state["model.layers.0.input_layernorm.weight"] /= factor
        for name in names:
            state[f"{name}.weight"] *= factor

    recipe = gptq_recipe(quantizer="rtn", compute="fp32")
    proof = Proof(tokens=64, length=32)
    plain = quantize_directory(tiny_model("llama"), tmp_path / "plain", recipe, proof=proof)
    assert plain["fallbacks"] == []
    model = changed(tiny_model("llama"), tmp_path / "model", rescale)
    report = quantize_directory(model, tmp_path / "out", recipe, proof=proof)
    text = "scales are stored as fp32, for 32 of 32 rows are out of the range of fp16"
    assert report["fallbacks"] == [{"weight": name, "what": text} for name in names]
    formats = {row["name"]: row["format"] for row in report["layers"]}
    assert {formats[name] for name in names} == {"int4-g32-zero-fp32"}
    assert {formats[name] for name in formats if name not in names} == {"int4-g32-zero"}
    # Scales of fp16 and fp32 differ by 2^-11 of themselves: far less than what 4 bits cost.
    assert report["figures"]["kl_mean"] == pytest.approx(plain["figures"]["kl_mean"], rel=0.05)
    with pytest.raises(NumericsError, match=r"self_attn\.q_proj: scales are stored as fp32"):
        quantize_directory(model, tmp_path / "strict", recipe, strict=True, proof=Proof(tokens=0))


def test_what_no_store_holds_is_named(tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path) -> None:
    def shrink(state: State) -> None:
        state["model.layers.0.mlp.down_proj.weight"] *= 1e-9

    model = changed(tiny_model("llama"), tmp_path / "model", shrink)
    recipe = gptq_recipe(quantizer="rtn", weights="kmeans2-row")
    report = quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0))
    assert {item["weight"] for item in report["fallbacks"]} == {"model.layers.0.mlp.down_proj"}
    assert "32 of 32 rows are out of the range of kmeans2-row" in report["fallbacks"][0]["what"]


def test_what_overflows_is_named(tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path) -> None:
    def grow(state: State) -> None:
        state["model.layers.0.mlp.down_proj.weight"] *= 1e9

    model = changed(tiny_model("llama"), tmp_path / "model", grow)
    recipe = gptq_recipe(quantizer="rtn", weights="kmeans2-row")
    with pytest.raises(
        NumericsError, match=r"^model\.layers\.0\.mlp\.down_proj: levels of kmeans2 is beyond the range of fp16"
    ):
        quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0))


def test_inputs_too_large_to_be_squared_are_named(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    def rescale(state: State) -> None:
        state["model.layers.0.post_attention_layernorm.weight"] *= 1e21
        for p in ("gate", "up"):
            state[f"model.layers.0.mlp.{p}_proj.weight"] *= 1e-21

    model = changed(tiny_model("llama"), tmp_path / "model", rescale)
    report = quantize_directory(model, tmp_path / "out", gptq_recipe(compute="fp32"), proof=Proof(tokens=0))
    named = {item["weight"] for item in report["fallbacks"] if "beyond the range of float32" in item["what"]}
    assert named == {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")}
    assert all(0 < row["error"] < 0.1 for row in report["layers"])


# ----------------------------------------------------------------------------------------------------------- infinite figures


def test_a_figure_that_is_no_number_publishes_nothing_and_loses_nothing(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, proof = gptq_recipe(quantizer="rtn"), Proof(tokens=64, length=32)
    with monkeypatch.context() as patch:
        patch.setattr(distance, "_exp", lambda value: math.nan)
        with pytest.raises(NumericsError, match="the proof: perplexity is not a number"):
            quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=proof)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(BlockCompressor, "visit_", None)  # every block is done already
        quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=proof)
    assert (tmp_path / "out" / MANIFEST_NAME).exists()
