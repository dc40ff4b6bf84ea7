"""Speed of integer products: prompts of models whose inputs are rounded, beside weights alone and transformers in bf16, and what an online
rotation costs of the product that it serves.

    make bench Q=integers
    python benchmarks/integers.py --only smollm2-135m hadamard
    python benchmarks/integers.py --render          # the tables of docs/activations.md, from the rows of the last run

Models are rounded to nearest, without smoothing: speed does not depend on the codes. All of them are open in one process and take turns,
prompt by prompt, so that ratios are those of one time; transformers runs in a process of its own, once before them and once behind. Ratios
are medians over turns. "hadamard" multiplies single layers with and without the rotation in turn: its cost is the difference, relative to the
product without it. One row of benchmarks/results/integers.jsonl is one contender of a model, or one layer.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bitpress.settings import code_path, share_cores

share_cores()  # torch's idle threads would spin beside the engine's

import numpy as np  # noqa: E402
from engine import CACHE, MODELS, NAMES, last_run, run  # noqa: E402
from rows import ROOT, add_row, read_rows, rewrite_section  # noqa: E402

PLAIN = ["--set", "transforms=[]"]
ROTATED = ["--set", 'transforms=[{"name": "hadamard"}]']
# Options of `bitpress quantize`, by the name of the contender.
CONTENDERS = {
    "int4-g64": ["--weights", "int4-g64"],
    "w8a8": ["--scheme", "w8a8", *PLAIN],
    "w8a8-static": ["--scheme", "w8a8-static", *PLAIN, "--samples", "4"],
    "w8a8-hadamard": ["--scheme", "w8a8", *ROTATED],
    "w4a8": ["--scheme", "w4a8", *PLAIN],
    "w4a4": ["--scheme", "w4a4", *PLAIN],
}
# Of the large model those that the others do not foretell, and prompts of half the length: its quantizing takes longer than the rest.
LARGE = ("int4-g64", "w8a8", "w8a8-static")
BASE = "int4-g64"
PARTS = (*MODELS, "hadamard")
# Layers that share an input are one product: q, k and v; gate and up.
SHAPES = {
    "smollm2-135m": {"q, k, v": (960, 576), "o": (576, 576), "gate, up": (3072, 576), "down": (576, 1536)},
    "llama-1.1b": {"q, k, v": (2560, 2048), "o": (2048, 2048), "gate, up": (11264, 2048), "down": (2048, 5632)},
}
ROTATED_ROWS = (1, 512)
DOCUMENT = ROOT / "docs" / "activations.md"


# ---- whole models ----


def quantized(model: str, name: str) -> Path:
    """Return a model of a contender, quantizing it where that has not been done."""
    out = CACHE / "benchmarks" / "integers" / f"{model}-{name}"
    if not (out / "bitpress.json").exists():
        if model == "llama-1.1b" and not (MODELS[model] / "model.safetensors").exists():
            subprocess.run([sys.executable, Path(__file__).parent / "random_llama.py", MODELS[model]], check=True)
        source = "smollm2-135m" if model == "smollm2-135m" else MODELS[model]
        command = [sys.executable, "-m", "bitpress", "quantize", source, out, *CONTENDERS[name], "--quantizer", "rtn"]
        subprocess.run([str(part) for part in [*command, "--proof-tokens", "0"]], check=True, stdout=sys.stderr)
    return out


def transformers(model: str, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of prompts in transformers, in bf16."""
    script = ROOT / "benchmarks" / "peers" / "transformers_speed.py"
    sizes = ["--prefill", prompt_tokens(model, options), "--decode", 1, "--repeats", options.repeats]
    facts = run([sys.executable, script, MODELS[model], "--threads", options.threads, *sizes])
    rates: dict[str, float] = facts["prefill_tokens_per_s"]
    return rates


def prompt_tokens(model: str, options: argparse.Namespace) -> int:
    count: int = options.tokens
    return count if model == "smollm2-135m" else count // 2


def prompts(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time prompts of every contender in turn; return a row for each of them."""
    from bitpress.runtime.native.options import EngineOptions
    from bitpress.runtime.opening import load_native

    names = [name for name in options.contenders if model == "smollm2-135m" or name in LARGE]
    count = prompt_tokens(model, options)
    room = EngineOptions(context=count, threads=options.threads)
    engines = {name: load_native(quantized(model, name), room).engine for name in names}
    tokens = np.random.default_rng(0).integers(engines[names[0]].layout.vocabulary, size=count, dtype=np.int32)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peers = [transformers(model, options)] if options.transformers else []
    for _ in range(options.turns + 1):
        for name, engine in engines.items():
            engine.truncate(0)
            seconds[name].append(timed(partial(engine.read, tokens, logits=True)))
    peers += [transformers(model, options)] if options.transformers else []
    bf16 = max((rates["median"] for rates in peers), default=None)  # the better of its two runs
    rows = []
    for name, engine in engines.items():
        times = seconds[name][1:]
        row: dict[str, Any] = {key: engine.facts[key] for key in ("path", "inputs", "expanded", "bits_in_memory")}
        row |= {"what": "prefill", "model": model, "format": name, "tokens": count}
        row["tokens_per_second"] = percentiles([count / t for t in times])
        if BASE in seconds:
            row["of_int4"] = percentiles([a / b for a, b in zip(seconds[BASE][1:], times, strict=True)])
        if "w8a8" in seconds:
            row["of_w8a8"] = percentiles([a / b for a, b in zip(seconds["w8a8"][1:], times, strict=True)])
        if bf16 is not None:
            row["of_bf16"] = row["tokens_per_second"]["median"] / bf16
        rows.append(row)
    if bf16 is not None:
        rates = max(peers, key=lambda each: each["median"])
        rows.append({"what": "prefill", "model": model, "format": "bf16", "tokens": count, "tokens_per_second": rates})
    return rows


# ---- the rotation of a row ----


def rotations(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time W8A8 and W4A4 products with and without a random Hadamard rotation of the row in turn; return a row for each layer."""
    import torch

    from bitpress import native
    from bitpress.formats import ActivationFormat, CompressedWeight, Hadamard, Packed, parse_format
    from bitpress.kernels.native_layout import lay_out

    multiplier = native.library().Multiplier(options.threads, code_path())
    draw = torch.Generator().manual_seed(0)
    found = []
    for (layer, (out, columns)), bits in [(shape, bits) for shape in SHAPES[model].items() for bits in (8, 4)]:
        w, fmt = torch.randn(out, columns, generator=draw), parse_format(f"int{bits}-row")
        params = fmt.fit(w)
        packed = Packed.pack(fmt, fmt.encode(w, params), params)
        inputs = ActivationFormat(parse_format(f"int{bits}-row-fp32"))
        plain, turned = (
            lay_out(CompressedWeight((packed,), change), inputs=inputs).linear
            for change in (None, Hadamard.random(columns, columns, draw))
        )
        for count in ROTATED_ROWS:
            x, y = torch.randn(count, columns, generator=draw).numpy(), np.empty((count, out), np.float32)
            calls = max(1, int(2e8 / (count * out * columns)))  # some milliseconds

            def multiply(linear: Any, x: np.ndarray = x, y: np.ndarray = y, calls: int = calls) -> float:
                return timed(lambda: [multiplier.multiply(linear, x, y, True) for _ in range(calls)]) / calls

            turns = [(multiply(plain), multiply(turned)) for _ in range(options.rotation_turns + 1)][1:]
            row: dict[str, Any] = {"what": "hadamard", "model": model, "layer": layer, "shape": [out, columns]}
            row |= {"rows": count, "format": f"w{bits}a{bits}", "path": multiplier.path}
            row["microseconds"] = statistics.median(first for first, _ in turns) * 1e6
            row["share"] = percentiles([(second - first) / first for first, second in turns])
            found.append(row)
    return found


# ---- rows ----


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentiles(values: list[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def measure(options: argparse.Namespace) -> None:
    started = datetime.datetime.now().isoformat(timespec="seconds")
    models = [model for model in options.only if model != "hadamard"]
    turned = (models or list(MODELS)) if "hadamard" in options.only else []
    rows = [row for model in turned for row in rotations(model, options)]
    for model in models:
        rows += prompts(model, options)
    for row in rows:
        add_row("integers", {"run": started, "used_threads": options.threads, "turns": options.turns, **row})


def render() -> None:
    """Write the tables of the last run of every model into the document."""
    lines = []
    for model, name in NAMES.items():
        for what, title, table in (("prefill", "prompts", prompt_table), ("hadamard", "online rotations", rotation_table)):
            rows = last_run([row for row in read_rows("integers") if row["what"] == what], model)
            if rows:
                head = f"**{name}**, {title}: {rows[0]['used_threads']} threads, {rows[0]['device']}, path {rows[0]['path']}"
                lines += ["", head, "", *table(rows)]
    rewrite_section(DOCUMENT, "measured speed", [*lines, ""] if lines else [])


def prompt_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| | {rows[0]['tokens']} tokens, tokens/s | of int4-g64 | of w8a8 | of transformers, bf16 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [row[key]["median"] if key in row else None for key in ("of_int4", "of_w8a8")] + [row.get("of_bf16")]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {' | '.join([row['format'], format(row['tokens_per_second']['median'], '.4g'), *cells])} |")
    return lines


def rotation_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the rotation costs of each product, in per cent."""
    kinds = dict.fromkeys((row["format"], row["rows"]) for row in rows)
    lines = ["| cost of the rotation, of the product | " + " | ".join(f"{fmt}, rows {count}" for fmt, count in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for layer, shape in dict.fromkeys((row["layer"], tuple(row["shape"])) for row in rows):
        shares = {(row["format"], row["rows"]): row["share"]["median"] for row in rows if row["layer"] == layer}
        lines.append(f"| {layer} [{shape[0]}, {shape[1]}] | " + " | ".join(f"{shares[kind]:.1%}" for kind in kinds) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=PARTS, choices=PARTS, help="models, and the cost of rotations; all by default"
    )
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt of SmolLM2; the large model's has half of them")
    parser.add_argument("--turns", type=int, default=5, help="prompts of every contender")
    parser.add_argument("--repeats", type=int, default=2, help="prompts of transformers, twice")
    parser.add_argument("--rotation-turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--render", action="store_true", help="only write the tables of docs/activations.md")
    options = parser.parse_args()
    if not options.render:
        measure(options)
    render()


if __name__ == "__main__":
    main()
