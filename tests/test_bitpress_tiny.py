"""The models inside the package: trained weights off any grid and real routing, in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitpress
from bitpress.calibration import builtin_texts
from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.named import SHIPPED_MODELS, resolve_model
from bitpress.pipeline.quantize import plan_run
from bitpress.presets import find_preset, preset_names, preset_widths
from bitpress.recipes import build_method, make_recipe

Quantize = Callable[..., Any]


@pytest.fixture
def quantize(text_file: Path, tmp_path: Path) -> Quantize:
    """Quantize a model with short texts: tokenizing all built-in text would take most of the time."""
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(builtin_texts("heldout")["speeches"][:20_000], encoding="utf-8")

    def quantize(model: str, **options: str) -> Any:
        texts = {"calibration": str(text_file), "samples": 16, "length": 256, "proof_text": str(heldout), "proof_tokens": 2048}
        return bitpress.quantize(model, tmp_path / ("-".join(options.values()) or "default"), **texts, **options)

    return quantize


def test_the_default_beats_rounding_on_trained_weights(quantize: Quantize) -> None:
    rounded = quantize("bitpress-tiny", weights="int4-g64-zero", quantizer="rtn")
    report = quantize("bitpress-tiny")
    assert report["calibrated"] == {"weights": 43, "of": 43}  # 7 in each block, and the tied table
    assert report["fallbacks"] == []
    assert report["figures"]["runtime"]["name"] == "native"
    assert report["figures"]["bits_per_weight"] <= rounded["figures"]["bits_per_weight"]
    assert 0 < report["figures"]["kl_mean"] < 0.0003 < rounded["figures"]["kl_mean"] < 0.003
    # The engine rounds activations and the head too.
    assert report["figures"]["runtime"]["kl_mean"] < 0.0006


def test_every_expert_sees_calibration_text_and_not_the_same_share(quantize: Quantize) -> None:
    report = quantize("bitpress-tiny-moe", weights="int4-g64-zero", quantizer="gptq")
    assert report["calibrated"] == {"weights": 19, "of": 19}  # 6 in each block, and the tied table
    assert report["fallbacks"] == []
    experts = [layer for layer in report["layers"] if isinstance(layer["tokens"], list)]
    assert len(experts) == 6  # two stacks of 8 in each of 3 blocks
    for layer in experts:
        assert len(layer["tokens"]) == 8
        assert sum(layer["tokens"]) == 2 * 16 * 256
        assert min(layer["tokens"]) >= 32, layer["name"]
        assert max(layer["tokens"]) > 1.2 * min(layer["tokens"]), layer["name"]  # a router that decides


def test_every_preset_suits_experts() -> None:
    model = resolve_model("bitpress-tiny-moe")
    for name in preset_names():
        for bits in preset_widths(name):
            plan, *_ = plan_run(model, build_method(make_recipe(find_preset(name, bits).recipe)))
            assert len(plan.weights) == 18, (name, bits)


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_its_widths_fit_every_usual_group(name: str) -> None:
    config = read_json(resolve_model(name) / "config.json")
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
