"""Biases take the mean error of their products, where there are biases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.models.opening import open_original
from bitpress.pipeline import biases
from bitpress.pipeline.biases import NO_BIAS

KEYS = {"weights": "int3-row", "quantizer": "rtn", "calibration": {"samples": 2, "length": 32}}


def quantize(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    return bitpress.quantize(model, out, recipe={**KEYS, **keys}, proof_tokens=0)


@pytest.mark.parametrize(
    "keys",
    [{}, {"inputs": "int4-row-fp32", "transforms": [{"name": "smoothquant", "run_time": True}]}],
)
def test_the_mean_error_of_every_product_goes_into_its_bias(
    keys: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = tiny_model("gpt2"), {}
    correct = biases.BiasCorrection.change

    def note(self: Any, wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        seen[len(seen)] = (wanted, given)
        return correct(self, wanted, given)

    monkeypatch.setattr(biases.BiasCorrection, "change", note)
    quantize(source, tmp_path / "out", corrections=["bias"], **keys)
    quantize(source, tmp_path / "plain", corrections=[], **keys)
    made, plain = (CompressedCheckpoint.open(tmp_path / name).load("") for name in ("out", "plain"))
    before = open_original(source, torch.float32)[1].load("")
    assert len(seen) == 8
    first = [name for name in before if name.startswith("transformer.h.0.") and name.endswith("bias") and ".ln_" not in name]
    assert len(first) == 4
    order = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    for k, place in enumerate(order):
        name = f"transformer.h.0.{place}.bias"
        wanted, given = seen[k]
        if not keys:  # what a product was is known from outside only where nothing was folded
            torch.testing.assert_close(made[name] - before[name], (wanted - given).mean(0), rtol=1e-4, atol=1e-6)
        assert not torch.equal(made[name], plain[name])
        # The product without rounding is the original's: the error of 3 bits is smaller than the product.
        assert (wanted - given).norm() < 0.7 * wanted.norm()


def test_a_layer_without_a_bias_says_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(tiny_model("llama"), tmp_path / "out", corrections=["bias"])
    assert all(NO_BIAS in row["notes"] for row in report["layers"])
    report = quantize(tiny_model("opt"), tmp_path / "opt", corrections=["bias"])
    assert not [row for row in report["layers"] if NO_BIAS in row["notes"]]
