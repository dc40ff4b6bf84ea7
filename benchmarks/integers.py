"""Speed of integer products: prompts and single tokens of models whose inputs are rounded, beside weights alone and transformers in bf16.

    make bench Q=integers
    python benchmarks/integers.py --models smollm2-135m --rounds 3

Contenders are those of `CONTENDERS`: weights of 4 and 8 bits alone, schemes with dynamic and static inputs, and one behind an online rotation.
Models are rounded to nearest, without smoothing: speed does not depend on the codes. Contenders take turns, `--rounds` times, each in
a process of its own with as many threads; a row of benchmarks/results/integers.jsonl is one contender's turn. The table on the screen has the
median turn of each, and its rate relative to int4-g64 and to bf16.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import CACHE, MODELS, NAMES, run, transformers
from rows import add_row

# Options of `bitpress quantize`, by the name of the contender.
ROTATED = ["--set", 'transforms=[{"name": "hadamard"}]']
PLAIN = ["--set", "transforms=[]"]
CONTENDERS = {
    "int4-g64": ["--weights", "int4-g64"],
    "int8-g64": ["--weights", "int8-g64"],
    "w8a8": ["--scheme", "w8a8", *PLAIN],
    "w8a8-static": ["--scheme", "w8a8-static", *PLAIN],
    "w4a8": ["--scheme", "w4a8", *PLAIN],
    "w4a8-static": [
        "--scheme",
        "w4a8",
        *PLAIN,
        "--set",
        'inputs={"format": "int8-tensor", "parameters": "static", "observer": "minmax"}',
    ],
    "w4a4": ["--scheme", "w4a4", *PLAIN],
    "w4a4-hadamard": ["--scheme", "w4a4", *ROTATED],
}
BASE = "int4-g64"


def pressed(model: str, name: str) -> Path:
    """Return a model of a contender, pressing it where that has not been done."""
    out = CACHE / "benchmarks" / "integers" / f"{model}-{name}"
    if not (out / "bitpress.json").exists():
        if model == "llama-1.1b" and not (MODELS[model] / "config.json").exists():
            subprocess.run([sys.executable, Path(__file__).parent / "random_llama.py", MODELS[model]], check=True)
        source = "smollm2-135m" if model == "smollm2-135m" else MODELS[model]
        command = [sys.executable, "-m", "bitpress", "quantize", source, out, *CONTENDERS[name], "--quantizer", "rtn"]
        few = ["--samples", "4"] if "static" in name else []
        subprocess.run([str(part) for part in [*command, *few, "--proof-tokens", "0"]], check=True)
    return out


def ours(model: str, name: str, what: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitpress", "bench", what, pressed(model, name), "--json", "--repeats", options.repeats]
    facts = run([*command, "--threads", options.threads])
    kept = ("tokens_per_second", "share", "path", "context", "inputs", "expanded", "bits_in_memory")
    return {"tool": "bitpress", "format": name, "what": what} | {key: facts[key] for key in kept}


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    started = datetime.datetime.now().isoformat(timespec="seconds")
    rows = []
    for name in options.contenders:
        pressed(model, name)
    for _ in range(options.rounds):
        turns = [ours(model, name, what, options) for what in ("prefill", "decode") for name in options.contenders]
        turns += transformers(model, options) if options.transformers else []
        for row in turns:
            rows.append(
                add_row(
                    "integers",
                    {"model": model, "run": started, "repeats": options.repeats, "used_threads": options.threads, **row},
                )
            )
            print(
                f"{model:14s} {row['format']:14s} {row['what']:8s} {row['tokens_per_second']['median']:8.1f} tokens/s",
                flush=True,
            )
    return rows


def show(model: str, rows: list[dict[str, Any]]) -> None:
    """Print the median turn of every contender as a table."""
    rates = {
        (row["format"], row["what"]): statistics.median(
            other["tokens_per_second"]["median"]
            for other in rows
            if (other["format"], other["what"]) == (row["format"], row["what"])
        )
        for row in rows
    }
    print(f"\n**{NAMES[model]}**, {rows[0]['used_threads']} threads, {rows[0]['device']}\n")
    print("| | prefill 512, tokens/s | of int4-g64 | of bf16 | decode, tokens/s | of int4-g64 | of bf16 |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["format"] for row in rows):
        cells = [name]
        for what in ("prefill", "decode"):
            rate = rates[name, what]
            beside = [rates.get((other, what)) for other in (BASE, "bf16")]
            cells += [f"{rate:.4g}", *("" if other is None else f"{rate / other:.2f}" for other in beside)]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["smollm2-135m"], choices=MODELS)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    for model in options.models:
        show(model, measure(model, options))


if __name__ == "__main__":
    main()
