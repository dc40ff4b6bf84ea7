"""Every method on one model: KL, agreement, perplexity and time at 4, 3 and 2 bits, by `bitpress compare`.

    make bench Q=methods                                 every recipe of benchmarks/methods.yaml on the re-gauged SmolLM2
    python benchmarks/methods.py --only 'gptq*' rtn      some of them; what has been measured is kept
    python benchmarks/methods.py --render                only the table and the picture, from the rows there are

The comparison works in a directory of its own and goes on there after a stop. A row of benchmarks/results/methods.jsonl is one recipe at
one width.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import ROOT, add_row, read_rows, rewrite_section

from bitpress.cli.compare import label, ordered
from bitpress.cli.compare_picture import draw_comparison
from bitpress.pipeline.candidate import read_candidates
from bitpress.quantizers.table import QUANTIZERS
from bitpress.settings import cache_directory

MODEL = "smollm2-135m-regauged"
RECIPES = ROOT / "benchmarks" / "methods.yaml"
DOCUMENT = ROOT / "docs" / "methods.md"


def measure(out: Path, bits: str, only: list[str], options: list[str]) -> None:
    """Run the comparison and keep the rows that are new; those of recipes that failed are told and not kept."""
    command = [
        sys.executable,
        "-m",
        "bitpress",
        "compare",
        MODEL,
        str(out),
        "--recipes",
        str(RECIPES),
        "--bits",
        bits,
        "--json",
    ]
    command += [part for pattern in only for part in ("--only", pattern)] + options
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}")
    compared = json.loads(done.stdout)
    known = {(row["name"], row["bits"], row["finished"]) for row in read_rows("methods") if row["kind"] == "recipe"}
    shared = {"model": MODEL, "compute": compared["compute"], "sources": compared["texts"], "noise": compared["floor"]}
    for row in compared["rows"]:
        if row["failed"]:
            print(f"{label(row)}: failed: {row['failed']}", file=sys.stderr)
        elif (row["name"], row["bits"], row["finished"]) not in known:
            add_row("methods", {**shared, **row})


def missing() -> list[str]:
    """Name the quantizers that no recipe uses."""
    candidates, _ = read_candidates(RECIPES, range(1, 9))
    return sorted(set(QUANTIZERS) - {candidate.recipe.quantizer["name"] for candidate in candidates})


def latest() -> list[dict[str, Any]]:
    """The newest row of every recipe and width, of those that saw the same model and texts as the newest of all."""

    def seen(row: dict[str, Any]) -> tuple[Any, ...]:
        calibration = row["recipe"]["calibration"]
        return row["model"], row["sources"], calibration["samples"], calibration["length"]

    rows = read_rows("methods")
    return list({(row["name"], row["bits"]): row for row in rows if seen(row) == seen(rows[-1])}.values())


def render() -> None:
    """Write the section `measured` of docs/methods.md, and docs/methods.svg."""
    rows = latest()
    if not rows:
        return
    some = rows[0]
    read = ", ".join(f"{text['tokens']:,} tokens of {name} (`{text['source']}`)" for name, text in some["sources"].items())
    samples = some["recipe"]["calibration"]
    noise = (
        f" The original in {some['compute']} is {some['noise']['kl_mean']:.2g} nats a token away from itself in fp32."
        if some["noise"]["texts"]
        else ""
    )
    originals = ", ".join(f"{figures['perplexity_original']:.2f} on {name}" for name, figures in some["texts"].items())
    lines = [
        f"`{some['model']}`, all linears of the blocks, calibrated on {samples['samples']} windows of {samples['length']} built-in tokens, on the inputs",
        "that the original's blocks give unless the column says otherwise. KL from the original in nats a token, ± half a 95 % interval over",
        f"windows, on {read}; perplexity of the original {originals}.{noise} Bits count every stored byte. Rows of one width are in the order",
        "of their KL; a star marks what no other recipe beats in both bits and KL. Seconds are of pressing alone, on a machine as loaded as the",
        "rows say. `make bench Q=methods` prints it; the recipes are in `benchmarks/methods.yaml`, the rows in `benchmarks/results/methods.jsonl`.",
        "",
        "![KL against stored bits](methods.svg)",
        "",
    ]
    names = list(some["texts"])
    lines += [
        f"| recipe | format | bits | {' | '.join(f'KL, {name} | top token | perplexity' for name in names)} | error | inputs | s |",
        f"|---|---|---|{'---|---|---|' * len(names)}---|---|---|",
    ]
    lines += [line(row, names) for row in ordered(rows)]
    rewrite_section(DOCUMENT, "measured", lines)
    (ROOT / "docs" / "methods.svg").write_text(draw_comparison(rows, f"{some['model']}: what methods cost"), encoding="utf-8")


def line(row: dict[str, Any], names: list[str]) -> str:
    cells = [f"{row['label']}{' *' if row['front'] else ''}", row["weights"], f"{row['bits_per_weight']:.3f}"]
    for name in names:
        figures = row["texts"][name]
        width = "" if figures["kl_ci95"] is None else f" ± {figures['kl_ci95']:.4f}"
        perplexity = figures["perplexity"]
        shown = "inf" if perplexity is None else f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"
        cells += [f"{figures['kl_mean']:.4f}{width}", f"{100 * figures['top1_agreement']:.1f} %", shown]
    cells += [f"{row['error']:.4g}", row["inputs"] or "-", f"{row['seconds_pressing']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names or patterns of recipes")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "methods")
    parser.add_argument("--tokens", help="of every held-out text; rows of other numbers are not put in one table")
    parser.add_argument("--samples", help="calibration windows")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        for name in missing():
            print(f"{name}: has no recipe in {RECIPES.name}", file=sys.stderr)
        given = [("--tokens", options.tokens), ("--samples", options.samples)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        measure(options.out, options.bits, options.only, [part for key, value in given if value for part in (key, value)])
    if read_rows("methods"):
        render()


if __name__ == "__main__":
    main()
