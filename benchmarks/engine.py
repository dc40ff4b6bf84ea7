"""Tokens a second on this machine: bitpress's native engine, llama.cpp (two builds) and transformers, one after the other.

    make peers && make bench Q=engine
    python benchmarks/engine.py --models smollm2-135m --rounds 2
    python benchmarks/engine.py --render          # the tables of docs/speed.md, the line of README.md and the picture, from the rows

Every contender runs in a process of its own with as many threads; the contenders take turns, `--rounds` times, `--repeats` repetitions
each, and a row is one contender's turn. Both models are pressed by rounding to nearest: speed does not depend on the codes. The tables
take each contender's median turn of the last run. llama.cpp is compared at equal names and with its bytes beside it: what its files
really hold is in the column of bits.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import ROOT, add_row, read_rows, rewrite_section

CACHE = Path(os.environ.get("BITPRESS_CACHE", Path.home() / ".cache" / "bitpress"))
MODELS = {
    "smollm2-135m": CACHE / "models" / "smollm2-135m",
    "llama-1.1b": CACHE / "benchmarks" / "llama-1.1b-random",
}
NAMES = {"smollm2-135m": "SmolLM2-135M", "llama-1.1b": "Llama shape, 1.1 B"}
FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q8_0")
BUILDS = ("llamacpp", "llamacpp-amx")
PICTURE = ROOT / "docs" / "engine.png"


def run(command: list[str | Path]) -> dict[str, Any]:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def pressed(model: str, name: str) -> Path:
    """Return a model in a format, pressing it where that has not been done."""
    out = CACHE / "benchmarks" / "engine" / f"{model}-{name}"
    if not (out / "bitpress.json").exists():
        if model == "llama-1.1b" and not (MODELS[model] / "config.json").exists():
            subprocess.run([sys.executable, ROOT / "benchmarks" / "random_llama.py", MODELS[model]], check=True)
        source = "smollm2-135m" if model == "smollm2-135m" else MODELS[model]
        command = [sys.executable, "-m", "bitpress", "quantize", source, out, "--weights", name, "--quantizer", "rtn"]
        subprocess.run([str(part) for part in [*command, "--proof-tokens", "0"]], check=True)
    return out


def ours(model: str, name: str, what: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run `bitpress bench`."""
    command = [sys.executable, "-m", "bitpress", "bench", what, pressed(model, name), "--json", "--repeats", options.repeats]
    facts = run([*command, "--threads", options.threads, *more])
    kept = ["tokens_per_second", "share", "path", "context", "file_bytes", "peak_memory_bytes", "load_seconds", "cache", "head"]
    kept += ["bits_stored", "bits_in_memory", "expanded"]
    row = {key: facts[key] for key in kept if key in facts}
    row |= {key: facts[key] for key in facts if key.startswith(("gigabytes", "machine", "tera", "bytes_per_token"))}
    return {"tool": "bitpress", "format": name, **row}


def llamacpp(model: str, name: str, build: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    python = ROOT / ".peers" / build / "bin" / "python"
    file = CACHE / "benchmarks" / "gguf" / model / f"{name}.gguf"
    if not file.exists():
        script = ROOT / "benchmarks" / "peers" / "gguf_models.py"
        subprocess.run([python, script, MODELS[model], file.parent, "--types", *TYPES], check=True)
    script = ROOT / "benchmarks" / "peers" / "llamacpp_speed.py"
    facts = run([python, script, file, "--threads", options.threads, "--repeats", options.repeats])
    shared = {"tool": build, "format": name, "version": facts["version"], "bytes_per_token": facts["bytes_per_token"]}
    shared |= {"bits_per_linear_weight": facts["bits_per_linear_weight"], "peak_memory_bytes": int(facts["peak_rss_mb"] * 1e6)}
    shared |= {"context": 0, "buffers_mib": facts["buffers_mib"]}
    return [{**shared, "what": what, "tokens_per_second": facts[f"{what}_tokens_per_s"]} for what in ("prefill", "decode")]


def transformers(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    script = ROOT / "benchmarks" / "peers" / "transformers_speed.py"
    facts = run([sys.executable, script, MODELS[model], "--threads", options.threads, "--repeats", options.repeats])
    shared = {"tool": "transformers", "format": "bf16", "version": facts["version"], "context": 0}
    return [{**shared, "what": what, "tokens_per_second": facts[f"{what}_tokens_per_s"]} for what in ("prefill", "decode")]


def measure(options: argparse.Namespace) -> None:
    started = datetime.datetime.now().isoformat(timespec="seconds")

    def keep(model: str, row: dict[str, Any]) -> None:
        add_row("engine", {"model": model, "run": started, "repeats": options.repeats, "used_threads": options.threads, **row})
        rate = row["tokens_per_second"]
        print(
            f"{model:14s} {row['tool']:13s} {row['format']:10s} {row['what']:8s} context {row['context']:5d}  {rate['median']:8.1f} "
            f"tokens/s ({rate['p10']:.1f} .. {rate['p90']:.1f})",
            flush=True,
        )

    for model in options.models:
        for name in options.formats:
            pressed(model, name)
        for _ in range(options.rounds):
            for what in ("decode", "prefill"):
                for name in options.formats:
                    keep(model, {"what": what, **ours(model, name, what, options)})
            for build in options.builds:
                for name in options.types:
                    for row in llamacpp(model, name, build, options):
                        keep(model, row)
            if options.transformers:
                for row in transformers(model, options):
                    keep(model, row)
            if model == "llama-1.1b" and "int4-g64" in options.formats:
                for context in (0, 4096):
                    more = ("--context", str(context), "--cache", "int8")
                    keep(model, {"what": "decode", **ours(model, "int4-g64", "decode", options, *more)})


def table(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return one line a contender: the median of its turns."""
    groups: dict[tuple[str, str, str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["model"] == model:
            key = (row["tool"], row["format"], row["what"], row["context"], row.get("cache", "fp16"))
            groups.setdefault(key, []).append(row)
    lines = []
    for (tool, name, what, context, cache), turns in groups.items():
        rates = [turn["tokens_per_second"]["median"] for turn in turns]
        middle = min(turns, key=lambda t: abs(t["tokens_per_second"]["median"] - statistics.median(rates)))
        lines.append({**middle, "tool": tool, "format": name, "what": what, "context": context, "cache": cache})
    return lines


def last_run(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    runs = [row["run"] for row in rows if row["model"] == model]
    return [row for row in rows if row["model"] == model and row["run"] == max(runs)] if runs else []


def bits(row: dict[str, Any]) -> float:
    if row["tool"] == "bitpress":
        return float(row["format"][3]) + 0.25
    return float(row.get("bits_per_linear_weight", 16))


def render() -> None:
    rows = read_rows("engine")
    lines = []
    for model, name in NAMES.items():
        found = table(last_run(rows, model), model)
        if not found:
            continue
        speed = {(r["tool"], r["format"], r["what"], r["context"], r["cache"]): r for r in found}
        lines += ["", f"**{name}**, {found[0]['used_threads']} threads, {found[0]['device']}", ""]
        lines += ["| | bits a weight | prefill 512, tokens/s | decode, tokens/s |", "|---|---|---|---|"]
        contenders = sorted({(r["tool"], r["format"]) for r in found}, key=lambda c: (c[0] != "bitpress", c))
        for tool, fmt in contenders:
            both = [speed.get((tool, fmt, what, 0, "fp16")) for what in ("prefill", "decode")]
            figures = ["" if row is None else f"{row['tokens_per_second']['median']:.4g}" for row in both]
            held = next(row for row in both if row is not None)
            label = {"llamacpp": "llama.cpp", "llamacpp-amx": "llama.cpp, AMX repaired"}.get(tool, tool)
            lines.append(f"| {label} {fmt} | {bits(held):.2f} | {figures[0]} | {figures[1]} |")
    rewrite_section(ROOT / "docs" / "speed.md", "engine", lines)
    rewrite_section(ROOT / "README.md", "engine", summary(rows))
    draw(rows)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The decode speed of both models at 4 bits, beside the other runtimes, in two lines."""
    lines = []
    for model, name in NAMES.items():
        found = [r for r in table(last_run(rows, model), model) if r["what"] == "decode" and not r["context"]]
        rates = {(r["tool"], r["format"]): r["tokens_per_second"]["median"] for r in found if r["cache"] == "fp16"}
        amx = rates.get(("llamacpp-amx", "Q4_0"))
        lines.append(
            f"* {name}, int4-g64: **{rates['bitpress', 'int4-g64']:.4g}** tokens per second; "
            f"llama.cpp Q4_0: {rates['llamacpp', 'Q4_0']:.4g}{'' if amx is None else f' (AMX repaired: {amx:.4g})'}; "
            f"transformers in bf16: {rates['transformers', 'bf16']:.4g}."
        )
    return lines


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw decode speed against bits for both models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    looks = {
        "bitpress": ("#c2410c", "o", "bitpress"),
        "llamacpp-amx": ("#1d4ed8", "^", "llama.cpp, AMX repaired"),
        "llamacpp": ("#60a5fa", "s", "llama.cpp"),
        "transformers": ("#52525b", "D", "transformers, bf16"),
    }
    for axis, (model, name) in zip(axes, NAMES.items(), strict=True):
        found = [
            r
            for r in table(last_run(rows, model), model)
            if r["what"] == "decode" and not r["context"] and r["cache"] == "fp16"
        ]
        for tool, (color, marker, label) in looks.items():
            points = sorted((bits(r), r["tokens_per_second"]["median"]) for r in found if r["tool"] == tool)
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=color, label=label, linewidth=1.5)
        axis.set(title=name, xlabel="bits a linear weight", xscale="log", ylim=(0, None))
        axis.set_xticks([2, 3, 4, 6, 8, 16], labels=["2", "3", "4", "6", "8", "16"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("decoded tokens/s")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--builds", nargs="*", default=[b for b in BUILDS if (ROOT / ".peers" / b).exists()])
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--render", action="store_true", help="only write docs/speed.md, the line of README.md and the picture")
    options = parser.parse_args()
    if not options.render:
        if not options.builds:
            print("llama.cpp is not here; run make peers.")
        measure(options)
    render()


if __name__ == "__main__":
    main()
