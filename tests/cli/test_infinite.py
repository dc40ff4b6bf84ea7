"""Figures that are infinite, in every place where a person or a program reads them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bitpress.pipeline.quantize import Proof, quantize_directory


def test_an_infinite_perplexity_is_reported_as_such(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, bitpress: Callable[..., Any]
) -> None:
    """Logits three thousand times as large leave nothing for the tokens that follow."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", tie_word_embeddings=False), model)
    state = load_file(model / "model.safetensors")
    state["lm_head.weight"] *= 3000
    save_file(state, model / "model.safetensors", {"format": "pt"})
    proof = Proof(tokens=64, length=32)
    report = quantize_directory(model, tmp_path / "out", gptq_recipe(quantizer="rtn"), proof=proof)
    assert report["figures"]["perplexity"] == report["figures"]["perplexity_original"] == "inf"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "| perplexity, compressed | inf |" in (tmp_path / "out" / "README.md").read_text()
    given = ("eval", tmp_path / "out", "--against", model, "--tokens", "32", "--length", "32")
    assert re.search(r"perplexity +inf \(original inf\)", bitpress(*given).out)
    figures = bitpress(*given, "--json").json
    assert (figures["perplexity"], figures["kl_ci95"]) == ("inf", None)
