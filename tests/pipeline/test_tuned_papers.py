"""Tunings that learn more than the first term of codes, through the whole way: written, verified, reloaded, the report told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint

RECIPES: dict[str, dict[str, Any]] = {
    "quip-sharp": {"weights": "e8p-row", "quantizer": "quip_sharp"},
    "ptq161": {"weights": "binary-row", "quantizer": "ptq161"},
    "low-rank": {"weights": "int2-g16-zero", "quantizer": "gptq", "corrections": [{"name": "loftq", "rank": 2}]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_goes_the_whole_way(name: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name] | {
        "tuning": [{"name": name, "steps": 12, "batch": 8, "rate": 2e-2, "checks": 3}],
        "calibration": {"text": str(text_file), "samples": 8, "length": 32},
    }
    bitpress.quantize(tiny_model("llama"), tmp_path / "out", recipe=recipe, proof_tokens=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(row["kept"] for row in report["tuned"]), "a few steps make one block better at least"
    assert all(row["after"] <= row["before"] for row in report["tuned"])
    CompressedCheckpoint.open(tmp_path / "out", verify=True)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        decoded, packed = (bitpress.load(tmp_path / "out", weights=kind)(tokens).logits for kind in ("decoded", "packed"))
    torch.testing.assert_close(packed, decoded, rtol=1e-4, atol=1e-4)
