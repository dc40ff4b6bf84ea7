"""Greedy text of files for llama.cpp: what llama.cpp goes on with, and what transformers says of the same weights, token by token.

    make peers && make bench Q=greedy
    python benchmarks/greedy.py --models smollm2-135m --bits 4 8
    python benchmarks/greedy.py --render                            only the table, from the rows there are

A model is quantized as `bitpress quantize MODEL OUT --for llama.cpp --bits N` does it. llama.cpp splits 10 prompts into tokens and goes on with
32 each, always the most likely; then our decoded weights in float32 give logits for the same tokens. A token of llama.cpp's is equal if it is
our most likely one too, a near-tie if its logit is less than 0.05 below, and other if not. A row of benchmarks/results/greedy.jsonl is one
file. llama.cpp rounds the inputs of products with compressed weights to 8 bits, so near-ties are to be expected.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, add_row, read_rows, rewrite_section

import bitpress
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.pipeline.exporting import open_model
from bitpress.settings import cache_directory

PEER = ROOT / ".peers" / "llamacpp" / "bin" / "python"
PAGE = ROOT / "docs" / "exchange.md"
SCRIPT = ROOT / "benchmarks" / "peers" / "gguf_greedy.py"
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fibonacci(n):",
    "The largest planet is",
    "In 1969,",
    "The recipe needs",
    "My favourite book",
    "Two plus two",
    "The sea was",
)
COUNT, TIE = 32, 0.05


def quantize(model: str, bits: int, out: Path) -> Path:
    """Write a model for llama.cpp, or keep the one that is there; return the file."""
    command = [sys.executable, "-m", "bitpress", "quantize", model, str(out), "--for", "llama.cpp", "--bits", str(bits)]
    subprocess.run([*command, "--proof-tokens", "0", "--json"], stdout=subprocess.PIPE, check=True)
    return out / "model.gguf"


def go_on(file: Path) -> dict[str, Any]:
    """Return llama.cpp's tokens of every prompt, and those that it goes on with."""
    if not PEER.exists():
        raise SystemExit(f"{PEER} is not here; run make peers.")
    words = [str(PEER), str(SCRIPT), str(file), "--threads", "1", "--count", str(COUNT), "--prompts", *PROMPTS]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@torch.inference_mode()
def compare(directory: Path, texts: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Count what our logits say of tokens that llama.cpp chose."""
    model, tokenizer = bitpress.load(directory, dtype="fp32"), load_tokenizer(directory)
    gaps: list[float] = []
    for text in texts:
        tokens = torch.tensor([text["prompt"] + text["tokens"]])
        logits = model(tokens).logits[0, len(text["prompt"]) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(text["tokens"])[:, None])[:, 0]
        gaps += (logits.amax(-1) - chosen).tolist()
    split = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS]
    ties = [gap for gap in gaps if 0 < gap < TIE]
    return {
        "tokens": len(gaps),
        "equal": sum(gap == 0 for gap in gaps),
        "near_ties": len(ties),
        "other": sum(gap >= TIE for gap in gaps),
        "widest_gap": max(gaps),
        "prompts_split_alike": sum(own == text["prompt"] for own, text in zip(split, texts, strict=True)),
    }


def render() -> None:
    """Write the table of docs/exchange.md from the last row of every model and number of bits."""
    rows = {(row["model"], row["bits"]): row for row in read_rows("greedy")}
    lines = ["", "| model | bits | tokens | equal | near-ties | other |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {model} | {bits} | {row['tokens']} | {row['equal']} | {row['near_ties']} | {row['other']} |"
        for (model, bits), row in sorted(rows.items())
    ]
    rewrite_section(PAGE, "greedy text", [*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["bitpress-tiny"])
    parser.add_argument("--bits", type=int, nargs="*", default=[4])
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "greedy")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    for model in [] if options.render else options.models:
        for bits in options.bits:
            file = quantize(model, bits, options.out / f"{model}-{bits}")
            told = go_on(file)
            found = compare(open_model(file), told["texts"])
            shared = {"model": model, "bits": bits, "bytes": file.stat().st_size, "version": told["version"], "tie": TIE}
            add_row("greedy", {**shared, **found})
            print(
                f"{model}, {bits} bits: of {found['tokens']} tokens {found['equal']} equal, {found['near_ties']} near-ties, "
                f"{found['other']} other; {found['prompts_split_alike']} of {len(PROMPTS)} prompts are split alike."
            )
    render()


if __name__ == "__main__":
    main()
