"""Every row of the format table through the whole way: compressed by rounding and by GPTQ, written, verified, reloaded, same output.

Each weight of a tiny model gets another row, so one run serves as many rows as the model has weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import FormatError, UsageError
from bitpress.formats import GRIDS, SHORT, parse_format
from bitpress.formats.scale_runs import RunCodes
from bitpress.recipes import make_recipe

LAYERS = 4
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in PROJECTIONS]

ROWS = [row.in_block("g16") for row in GRIDS.values()] + [
    name
    for name in SHORT
    if ("g32" in SHORT[name] or "g16" in SHORT[name]) and not isinstance(parse_format(name).store, RunCodes)
]
ROWS += ["int4-g16-zero-s6", "int4-row-fp8", "ternary-g32-base3", "e2m3-g32-split", "int4-64x1", "nf4-g16-dq", "int4-tensor"]
RUNS = [ROWS[i : i + len(WEIGHTS)] for i in range(0, len(ROWS), len(WEIGHTS))]


def format_for(row: str, weight: str) -> str:
    # Groups along the outputs, one column wide, need rows that they divide.
    return "int4-32x1" if row == "int4-64x1" else row


def by_turns() -> list[Any]:
    """Every run of rows with one of the quantizers; with the other before a release."""
    return [
        pytest.param(quantizer, run, marks=() if (run + i) % 2 == 0 else pytest.mark.release)
        for i, quantizer in enumerate(("rtn", "gptq"))
        for run in range(len(RUNS))
    ]


@pytest.mark.parametrize(("quantizer", "run"), by_turns())
def test_every_row_goes_the_whole_way(
    quantizer: str, run: int, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    chosen = {weight: format_for(row, weight) for weight, row in zip(WEIGHTS, RUNS[run], strict=False)}
    recipe: dict[str, Any] = {
        "weights": "int8-row",
        "overrides": [{"match": weight, "weights": name} for weight, name in chosen.items()],
        "quantizer": quantizer,
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
    }
    bitpress.quantize(model, tmp_path / "out", recipe=recipe, proof_tokens=0)
    compressed = CompressedCheckpoint.open(tmp_path / "out", verify=True)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        decoded = bitpress.load(tmp_path / "out")
        packed = bitpress.load(tmp_path / "out", weights="packed")
        logits = decoded(tokens).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(packed(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    for weight, name in chosen.items():
        stored = compressed.read_weight(f"{weight}.weight")
        assert stored.spec()["terms"][0]["format"] == parse_format(name).name
        assert torch.equal(stored.dequantize().to(decoded.dtype), decoded.get_submodule(weight).weight)


@pytest.mark.parametrize("name", ["nvfp4", "int4-tensor", "nf4-g16-dq", "ternary-g16-base3"])
def test_experts_that_share_nothing_are_stacked(
    name: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    bitpress.quantize(model, tmp_path / "out", recipe={"weights": name, "quantizer": "rtn"}, proof_tokens=0)
    CompressedCheckpoint.open(tmp_path / "out", verify=True)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        a = bitpress.load(tmp_path / "out")(tokens).logits
        b = bitpress.load(tmp_path / "out", weights="packed")(tokens).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_lossless_model_is_the_model(architecture: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(architecture, dtype="bfloat16")
    report = bitpress.quantize(model, tmp_path / "out", recipe={"weights": "dfloat11", "quantizer": "rtn"}, proof_tokens=64)
    assert report["figures"]["kl_mean"] == 0
    assert report["figures"]["bits_per_weight"] < 16
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")(tokens).logits
        assert torch.equal(bitpress.load(tmp_path / "out")(tokens).logits, original)


def test_what_cannot_be_lossless_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"layers\.0\..*keeps bfloat16 weights bit for bit, and these have more digits"):
        bitpress.quantize(tiny_model("llama"), tmp_path / "a", recipe={"weights": "dfloat11", "quantizer": "rtn"})
    with pytest.raises(UsageError, match="awq-scale would change them"):
        make_recipe({"weights": "dfloat11", "quantizer": "awq"})
    with pytest.raises(UsageError, match="awq-scale would change them"):
        make_recipe({"overrides": [{"match": "*.q_proj", "weights": "dfloat11"}], "quantizer": "awq"})
