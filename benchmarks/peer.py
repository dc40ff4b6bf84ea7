"""GPTQ here and in llm-compressor: same model, same calibration tokens, same format, one after the other, judged by the same code.

    make peers && make bench Q=peer

The peer keeps its defaults (static activation order, dampening 0.01, min-max scales) and writes its weights decoded to float32; both are
compared with the original in float32 on the same held-out windows.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rows import ROOT, add_row

MODEL = "smollm2-135m-regauged"
PEER = ROOT / ".peers" / "llmcompressor" / "bin" / "python"
SAMPLES, LENGTH, TOKENS = 128, 512, 8192
KEPT = ("kl_mean", "kl_ci95", "top1_agreement", "perplexity", "perplexity_original", "tokens")


def ours(out: Path, weights: str, quantizer: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitpress", "quantize", MODEL, str(out), "--weights", weights, "--quantizer", quantizer]
    command += ["--samples", str(SAMPLES), "--length", str(LENGTH), "--proof-tokens", str(TOKENS), "--json"]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    figures, run = report["figures"], report["run"]
    return {
        "tool": f"bitpress, {quantizer}",
        "weights": weights,
        **{key: figures[key] for key in KEPT},
        "bits_per_weight": figures["bits_per_weight"],
        "seconds_quantizing": run["seconds_pressing"],
        "seconds_with_proof": run["seconds"],
        "peak_memory_mb": round(run["peak_memory_bytes"] / 1e6),
    }


def peer(model: Path, folder: Path, bits: int) -> dict[str, Any]:
    from bitpress.measure.evaluation import evaluate
    from bitpress.models.tasks.causal_lm import draw_windows

    tokens = draw_windows("builtin", model, samples=SAMPLES, length=LENGTH, seed=0).inputs
    np.save(folder / "tokens.npy", tokens.numpy())
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_gptq.py"
    command = [str(PEER), str(script), "--model", str(model), "--tokens", str(folder / "tokens.npy"), "--bits", str(bits)]
    command += ["--group", "64", "--out", str(folder / "weights.safetensors")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    figures = evaluate(swap(model, folder / "weights.safetensors", folder / "peer"), model, tokens=TOKENS)
    return {
        "tool": f"llm-compressor {facts['version']}, GPTQ",
        "weights": f"int{bits}-g64-zero",
        **{key: figures[key] for key in KEPT},
        "bits_per_weight": bits + 16 / 64 + bits / 64,
        "seconds_quantizing": facts["seconds"],
        "peak_memory_mb": round(facts["peak_rss_mb"]),
        "rtn_fallback": facts["rtn_fallback"],
    }


def swap(model: Path, weights: Path, target: Path) -> Path:
    """Make a copy of a model directory whose linears are those of another file, in float32."""
    from safetensors.torch import load_file, save_file

    tensors = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    other = load_file(weights)
    unknown = set(other) - set(tensors)
    if unknown or len(other) != 210:
        raise SystemExit(f"{weights}: {len(other)} weights, {len(unknown)} of them unknown to the model.")
    tensors |= {name: value.float() for name, value in other.items()}
    target.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, nargs="*", default=[4])
    options = parser.parse_args()
    from bitpress.checkpoints.named import resolve_model

    if not PEER.exists():
        raise SystemExit("the peer's environment is not here; run make peers.")
    model = resolve_model(MODEL)
    rows = []
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for quantizer in options.methods:
                rows.append(add_row("peer", ours(folder / quantizer, f"int{bits}-g64-zero", quantizer)))
                print(json.dumps(rows[-1]), flush=True)
            rows.append(add_row("peer", peer(model, folder, bits)))
            print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        print(
            f"{row['tool']:36s} {row['weights']}  KL {row['kl_mean']:.4f} ± {row['kl_ci95']:.4f}  {row['bits_per_weight']:.4f} bits  "
            f"{row['seconds_quantizing']:.0f} s  {row['peak_memory_mb']} MB"
        )


if __name__ == "__main__":
    main()
