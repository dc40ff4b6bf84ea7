"""The whole way in a few seconds: toy model, quantize, publish, verify, read, generate, evaluate; then the same bytes again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint


def test_the_whole_way(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe: dict[str, Any] = {
        "weights": "int4-g16-zero",
        "quantizer": "gptq",
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
    }
    report = bitpress.quantize(model, tmp_path / "a", recipe=recipe, proof_tokens=64)
    assert report["calibrated"] == {"weights": 14, "of": 14}
    assert report["figures"]["kl_mean"] > 0
    assert report["figures"]["bits_per_weight"] == 4 + 16 / 16 + 4 / 16
    pressed = CompressedCheckpoint.open(tmp_path / "a")
    assert (
        sum((tmp_path / "a" / f).stat().st_size for f in pressed.manifest.files if f.endswith("safetensors")) == pressed.nbytes
    )

    loaded = bitpress.load(tmp_path / "a")
    tokens = torch.arange(5, 25)[None]
    made = loaded.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert made.shape[1] > tokens.shape[1]
    figures = bitpress.evaluate(tmp_path / "a", model, tokens=64, length=32)
    assert {"kl_mean", "kl_ci95", "top1_agreement", "perplexity", "perplexity_original", "bits_per_weight", "bytes"} <= set(
        figures
    )
    assert {"tokens", "tokens_per_second"} <= set(figures)

    bitpress.quantize(model, tmp_path / "b", recipe=recipe, proof_tokens=0)
    for name in [*pressed.manifest.files, "bitpress.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_transformers_reads_it_too(pressed_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(pressed_dir)(tokens).logits
        ours = bitpress.load(pressed_dir)(tokens).logits
    assert torch.equal(theirs, ours)


def test_importing_bitpress_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, bitpress; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
