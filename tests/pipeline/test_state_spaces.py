"""State spaces under a scheme of 4-bit weights and inputs: which matrices are products, what folds, and that every reader computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.pipeline.quantize import Proof, quantize_directory

TOKENS = torch.arange(6, 38).reshape(2, 16)
# Products of a block, and those of them whose channel factors no earlier parameter takes.
PRODUCTS = {"mamba": ({"in_proj", "x_proj", "out_proj"}, {"x_proj", "out_proj"}), "mamba2": ({"in_proj", "out_proj"}, set())}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_state_space_are_rounded_and_its_scan_is_not(
    name: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    products, online = PRODUCTS[name]
    inputs = {"format": "int4-row-fp32"}
    transforms = [{"name": "smoothquant", "run_time": True}, {"name": "klt"}]
    recipe = gptq_recipe(
        weights="int4-row", inputs=inputs, transforms=transforms, compute="fp32", embeddings="keep", head="keep"
    )
    report = quantize_directory(tiny_model(name), tmp_path, recipe, proof=Proof(tokens=0))
    checkpoint = CompressedCheckpoint.open(tmp_path)
    weights = checkpoint.manifest.weights
    assert {key.split(".")[-2] for key in weights} == products
    assert len(weights) == 2 * len(products)
    assert all(record.input is not None and record.spec["input_map"]["kind"] == "chain" for record in weights.values())
    told = {row["name"].rpartition(".")[2] for row in report["layers"] if row["fallbacks"]}
    assert told == online  # "no producer takes the input's scale; it is applied at run time"
    kept = {key.rpartition("mixer.")[2] for key in checkpoint.plain if "layers.0.mixer" in key}
    assert {"A_log", "D", "conv1d.weight"} <= kept
    assert ("dt_proj.weight" in kept) == (name == "mamba")
    with torch.no_grad():
        decoded, packed = (
            bitpress.load(tmp_path, weights=form, dtype="fp32")(input_ids=TOKENS, use_cache=False).logits
            for form in ("decoded", "packed")
        )
    assert torch.equal(decoded, packed)
