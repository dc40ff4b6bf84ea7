"""A made-up task is one class and one row of a table, and its models go the whole way: plan, quantize, load, evaluate, compare."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.image_classifier import ImageClassifier
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import bitpress
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import Variant
from bitpress.errors import CalibrationError, CheckpointError, UsageError
from bitpress.measure.evaluation import evaluate, evaluate_alone
from bitpress.measure.multiple_choice import evaluate_tasks
from bitpress.models.tasks.table import TASKS
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import build_method, make_recipe

BLOCKS, PER_BLOCK = 2, 6
CALIBRATION = {"text": "noise:1", "samples": 6}


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ImageClassifier:
    """The row of the table."""
    task = ImageClassifier()
    monkeypatch.setitem(TASKS, "image-classifier", task)
    return task


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small vision transformer with random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def recipe(quantizer: str, **values: Any) -> Any:
    return make_recipe({"weights": "int4-g32-zero", "quantizer": quantizer, "calibration": CALIBRATION, "batch": 4} | values)


# Statistics of inputs, of an uncompressed stream beside them, and of the loss; gram alone with blocks in stages.
@pytest.mark.parametrize("quantizer", ["gptq", "gptaq", "squeezellm"])
def test_an_image_classifier_goes_the_whole_way(quantizer: str, images: ImageClassifier, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights = "kmeans4-row" if quantizer == "squeezellm" else "int4-g32-zero"
    report = quantize_directory(
        source, out, recipe(quantizer, weights=weights), proof=Proof(tokens=5, text="noise:2"), strict=False
    )
    assert report["calibrated"] == {"weights": BLOCKS * PER_BLOCK, "of": BLOCKS * PER_BLOCK}
    assert report["calibration"] == {"images": 6, "kinds": {"noise": 6}}
    pixels = images.draw("noise:2", source, ViTConfig.from_pretrained(source), samples=5, length=1, seed=0).inputs
    original = ViTForImageClassification.from_pretrained(source).eval()
    decoded = bitpress.load(out, dtype="fp32").eval()
    assert type(decoded) is ViTForImageClassification
    with torch.no_grad():
        expected = images.distance(
            lambda image: original(pixel_values=image).logits, lambda image: decoded(pixel_values=image).logits, pixels
        )
        packed = bitpress.load(out, weights="packed", dtype="fp32")(pixel_values=pixels).logits
        torch.testing.assert_close(packed, decoded(pixel_values=pixels).logits, rtol=1e-4, atol=1e-5)
        hub = AutoModelForImageClassification.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(hub(pixel_values=pixels).logits, decoded(pixel_values=pixels).logits)
    assert report["figures"]["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-3)
    assert 0 < report["figures"]["kl_mean"] < 0.1
    assert report["figures"]["images"] == 5
    found = evaluate(out, source, text="noise:2", tokens=5)
    assert found["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-3)
    assert 0.2 < evaluate_alone(out, text="noise:2", tokens=5)["confidence"] <= 1
    card = (out / "README.md").read_text()
    assert "AutoModelForImageClassification" in card
    assert "token" not in card.partition("## Layers")[0]


def test_a_comparison_takes_any_task(images: ImageClassifier, source: Path, tmp_path: Path) -> None:
    variants = [Variant(name, None, build_method(recipe(name))) for name in ("rtn", "gptq")]
    found = compare_recipes(source, tmp_path / "out", variants, {"noise": "noise:2"}, tokens=5, length=2)
    assert [row["failed"] for row in found["rows"]] == [None, None]
    assert found["texts"] == {"noise": {"source": "noise:2", "images": 5}}
    assert found["rows"][0]["kl_mean"] > found["rows"][1]["kl_mean"] > 0


def test_errors_speak_of_the_task(images: ImageClassifier, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"builtin: unknown images; use noise:SEED"):
        quantize_directory(source, tmp_path / "out", recipe("gptq", calibration={"text": "builtin"}), proof=Proof(tokens=0))
    with pytest.raises(UsageError, match="is an image classifier; multiple-choice tasks are for causal language models"):
        evaluate_tasks(source, ["arc-easy"])


def test_a_model_of_no_task_is_refused(images: ImageClassifier, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForMaskedImageModeling"]}))
    with pytest.raises(
        CheckpointError,
        match="vit is another kind of model, not a causal language model; another kind of model, not an image classifier; "
        "bitpress quantizes causal language models and image classifiers",
    ):
        quantize_directory(source, tmp_path / "out", recipe("rtn"), proof=Proof(tokens=0))


def test_a_model_without_a_table_of_embeddings_has_none_to_compress(
    images: ImageClassifier, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="embeddings: ViTForImageClassification has no matrix that this key could name"):
        quantize_directory(source, tmp_path / "out", recipe("rtn", embeddings="int8-row"), proof=Proof(tokens=0))
