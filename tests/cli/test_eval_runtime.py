"""`bitpress eval --runtime` measures what the runtime gives and says which one it was; the report of a run shows both distances."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def test_eval_measures_through_a_runtime(
    bitpress: Run, pressed_original: Path, tiny_model: Callable[..., Path], text_file: Path
) -> None:
    source = tiny_model("llama", tie_word_embeddings=True)
    given = ("eval", pressed_original, "--against", source, "--text", text_file, "--tokens", 64, "--length", 32)
    weights = bitpress(*given, "--json").json
    native = bitpress(*given, "--runtime", "native", "--cache", "int8", "--json").json
    assert native["runtime"]["name"] == "native"
    assert native["runtime"]["settings"]["cache"] == "int8"
    assert native["kl_mean"] != weights["kl_mean"]
    assert native["perplexity_original"] == weights["perplexity_original"]
    assert "measured through" in bitpress(*given, "--runtime", "transformers").out
    assert "needs --runtime" in bitpress(*given, "--cache", "int8").error
    assert "unknown runtime" in bitpress(*given, "--runtime", "natve").error
    assert "needs --against" in bitpress("eval", pressed_original, "--tasks", "piqa", "--runtime", "native").error


def test_the_report_of_a_run_shows_both_distances(
    bitpress: Run, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    given = ("--weights", "int4-row", "--quantizer", "rtn", "--proof-tokens", 64, "--proof-text", text_file)
    done = bitpress("quantize", tiny_model("llama"), tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert "KL divergence from the original" in done.out
    assert "logits of the runtime" in done.out
    assert "native (activations" in done.out
