"""Which method at how many bits: KL, agreement, perplexity, time and memory on the re-gauged SmolLM2.

    python benchmarks/press.py                      every row
    python benchmarks/press.py --bits 4 --methods gptq awq
    python benchmarks/press.py --render             only the table and the picture, from the rows there are

Every row is one `bitpress quantize --json` in a process of its own, 128 x 512 built-in calibration tokens, the proof on held-out text
of kinds inside and outside of the calibration mix. The first row is the untouched model run in bf16: the noise floor.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import torch
from rows import ROOT, add_row, read_rows

MODEL = "smollm2-135m-regauged"
METHODS = {
    "rtn": ["--quantizer", "rtn"],
    "rtn, mse clipping": ["--quantizer", "rtn", "--set", "quantizer.clip=mse"],
    "awq": ["--quantizer", "awq"],
    "gptq": ["--quantizer", "gptq"],
    "awq-scale + gptq": ["--quantizer", "gptq", "--set", "transforms=[awq-scale]"],
}
TOKENS = 8192


def measure(method: str, bits: int, model: str = MODEL) -> dict[str, Any]:
    """Press and prove once."""
    with tempfile.TemporaryDirectory() as folder:
        weights = f"int{bits}-g64-zero"
        command = [sys.executable, "-m", "bitpress", "quantize", model, f"{folder}/out", "--weights", weights, *METHODS[method]]
        done = subprocess.run([*command, "--proof-tokens", str(TOKENS), "--json"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
        report = json.loads(done.stdout)
    figures, run = report["figures"], report["run"]
    kept = ("kl_mean", "kl_ci95", "top1_agreement", "perplexity", "perplexity_original", "bits_per_weight", "bytes", "tokens")
    return {
        "model": model,
        "method": method,
        "weights": weights,
        **{key: figures[key] for key in kept},
        "seconds_pressing": run["seconds_pressing"],
        "seconds": run["seconds"],
        "peak_memory_mb": round(run["peak_memory_bytes"] / 1e6),
        "threads": run["threads"],
        "fallbacks": len(report["fallbacks"]),
    }


def measure_floor() -> dict[str, Any]:
    """Run the untouched model in bf16 against itself in fp32."""
    from bitpress.checkpoints.named import resolve_model
    from bitpress.measure.evaluation import compare
    from bitpress.models.opening import open_streamed
    from bitpress.models.tasks.causal_lm import draw_windows

    path = resolve_model(MODEL)
    windows = draw_windows("builtin:heldout", path, samples=TOKENS // 512, length=512, seed=0)
    figures = compare(open_streamed(path, torch.bfloat16), open_streamed(path, torch.float32), windows.inputs)
    kept = ("kl_mean", "kl_ci95", "top1_agreement", "perplexity", "perplexity_original", "tokens")
    return {
        "model": MODEL,
        "method": "untouched, in bf16",
        "weights": "bf16",
        **{key: figures[key] for key in kept},
        "bits_per_weight": 16.0,
    }


def latest() -> list[dict[str, Any]]:
    """The newest row of every pair of method and format, by bits and distance."""
    rows = {(row["method"], row["weights"]): row for row in read_rows("press")}
    return sorted(rows.values(), key=lambda r: (-r["bits_per_weight"], -r["kl_mean"]))


def render() -> None:
    """Write docs/press.md and docs/press.png."""
    rows = latest()
    lines = [
        "| format | method | bits | KL | same top token | perplexity | quantizing, s | threads | load | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['weights']} | {r['method']} | {r['bits_per_weight']:.3f} | {r['kl_mean']:.4f} ± {r['kl_ci95']:.4f} | "
            f"{100 * r['top1_agreement']:.1f} % | {float(r['perplexity']):.2f} | {r.get('seconds_pressing', '')} | {r['threads']} | {r['load']:.1f} | {r.get('peak_memory_mb', '')} |"
        )
    original = float(rows[0]["perplexity_original"]) if rows else 0.0
    text = (
        "# Rounding, GPTQ and AWQ on four kinds of text\n\n"
        f"Re-gauged SmolLM2-135M, all 210 linear layers of the blocks; perplexity of the original {original:.2f}. Calibration: 128 windows of\n"
        f"512 built-in tokens. Evaluation: {TOKENS} tokens of four kinds of evaluation text, one of which (reference) calibration does not contain.\n"
        "Intervals are 95 % over windows. The machine's load while timing is in the column **load** (an idle machine has about the number of\n"
        "threads): compare times only between rows of equal load; `make bench Q=peer` times on an idle machine. `make bench Q=press` prints this\n"
        "table; the rows are in `benchmarks/results/press.jsonl`. [methods-results.md](methods-results.md) has all methods.\n\n"
        + "\n".join(lines)
        + "\n\n![KL against stored bits](press.png)\n"
    )
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "press.md").write_text(text, encoding="utf-8")
    draw(rows)
    print("\n".join(lines))


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    marks = dict(zip(METHODS, ("o", "s", "^", "D", "*"), strict=True))
    for method, mark in marks.items():
        points = sorted((r["bits_per_weight"], r["kl_mean"], r["kl_ci95"]) for r in rows if r["method"] == method)
        if points:
            x, y, e = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=e, marker=mark, capsize=3, label=method, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, from stored bytes")
    axes.set_ylabel("KL from the original, nats a token")
    axes.set_title("Re-gauged SmolLM2-135M, groups of 64 with a zero point", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "press.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        if options.methods == list(METHODS):
            print(json.dumps(add_row("press", measure_floor())))
        for bits in options.bits:
            for method in options.methods:
                print(json.dumps(add_row("press", measure(method, bits))), flush=True)
    if shutil.which("git"):
        render()


if __name__ == "__main__":
    main()
