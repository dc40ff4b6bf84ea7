"""Every method on one model: KL, agreement, perplexity and time at 4, 3 and 2 bits, by `bitpress compare`.

    make bench Q=methods                                 every recipe of benchmarks/methods.yaml on the re-gauged SmolLM2
    python benchmarks/methods.py --only 'gptq*' rtn      some of them
    python benchmarks/methods.py --tasks arc-easy,piqa   zero-shot accuracy of the best three recipes of every width
    python benchmarks/methods.py --render                only the table and the picture, from the rows there are
    python benchmarks/methods.py --presets               what `bitpress quantize --preset` takes, chosen from the rows there are

A row of benchmarks/results/methods.jsonl is one recipe at one width, or its answers to one task. A recipe that has a row is not run
again unless --again; the best are those of the rows. The comparison works in a directory of its own and takes what is there, after a stop
and with --again too.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from method_presets import choose_presets
from method_rows import MODEL, RECIPES, keys_of, latest, meant
from method_tables import render, render_tasks
from rows import add_row, read_rows

from bitpress.calibration import of_origin
from bitpress.cli.compare import label
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.pipeline.identity import recorded
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import build_method
from bitpress.settings import cache_directory


def compare(out: Path, bits: str, only: list[str], options: list[str]) -> dict[str, Any]:
    """Run `bitpress compare` on the bench's model and recipes, and return what it found."""
    out.parent.mkdir(parents=True, exist_ok=True)
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
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(out: Path, bits: str, only: list[str], options: list[str]) -> None:
    """Run the comparison and keep the rows that are new; rows of recipes that failed are printed and not kept."""
    compared = compare(out, bits, only, options)
    known = {(row["name"], row["bits"], row["finished"]) for row in read_rows("methods") if row["kind"] == "recipe"}
    shared = {"model": MODEL, "compute": compared["compute"], "sources": compared["texts"], "noise": compared["floor"]}
    for row in compared["rows"]:
        if row["failed"]:
            print(f"{label(row)}: failed: {row['failed']}", file=sys.stderr)
        elif (row["name"], row["bits"], row["finished"]) not in known:
            add_row("methods", {**shared, **row})
    answered = {
        (row["name"], row["bits"], row["task"], row["finished"]) for row in read_rows("methods") if row["kind"] == "tasks"
    }
    for row in compared["answers"]:
        if row["failed"]:
            print(f"{row['name'] or 'original'}, {row['task']}: failed: {row['failed']}", file=sys.stderr)
        elif (row["name"], row["bits"], row["task"], row["finished"]) not in answered:
            add_row("methods", {"model": MODEL, "compute": compared["compute"], **row})


def by_pass(candidates: Sequence[Variant], out: Path) -> dict[tuple[Path, int], list[str]]:
    """Return a directory and the names of recipes for every run of a comparison.

    Recipes share a width, and what they need of the pass over the original: statistics of the attention or of the loss would make it
    long for all.
    """
    runs: dict[tuple[Path, int], list[str]] = defaultdict(list)
    for c in candidates:
        needs = build_method(c.recipe).needs
        more = sorted(of_origin(needs, "attention") | of_origin(needs, "loss"))
        assert c.bits is not None, f"{RECIPES}: {c.name} has no bits"
        runs[out.with_name("-".join([out.name, *more])), c.bits].append(c.name)
    return dict(runs)


def pending(bits: list[int], only: list[str], again: bool) -> list[Variant]:
    """Return the recipes that have no row, or all with `again`; one that has changed since its row has none."""
    candidates, _ = read_candidates(RECIPES, bits, only=only)
    known = {} if again else {(row["name"], row["bits"]): meant(row) for row in latest()}
    return [c for c in candidates if known.get((c.name, c.bits)) != keys_of(recorded(build_method(c.recipe)))]


def best(bits: list[int], only: list[str], count: int) -> list[Variant]:
    """Return the `count` recipes of every width with the least KL, of those that have a row."""
    candidates, _ = read_candidates(RECIPES, bits, only=only)
    rows = {(row["name"], row["bits"]): row for row in latest()}
    measured = [
        c
        for c in candidates
        if (c.name, c.bits) in rows and meant(rows[c.name, c.bits]) == keys_of(recorded(build_method(c.recipe)))
    ]
    measured.sort(key=lambda c: float(rows[c.name, c.bits]["kl_mean"]))
    return [c for width in bits for c in [c for c in measured if c.bits == width][:count]]


def missing() -> list[str]:
    """Name the quantizers that no recipe uses."""
    candidates, _ = read_candidates(RECIPES, range(1, 9))
    return sorted(set(QUANTIZERS) - {candidate.recipe.quantizer_name for candidate in candidates})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names or patterns of recipes")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--again", action="store_true", help="also those that have a row; what --out holds is taken from there")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "methods")
    parser.add_argument("--tokens", help="of every held-out text; rows of other numbers are not put in one table")
    parser.add_argument("--samples", help="calibration windows")
    parser.add_argument(
        "--compute", default="bf16", help="bf16, the arithmetic of most rows, or fp32, for processors that emulate bf16"
    )
    parser.add_argument(
        "--tasks", help="multiple-choice tasks for the best recipes of every width by their rows, such as arc-easy,piqa"
    )
    parser.add_argument("--documents", help="questions of every task")
    parser.add_argument("--best", type=int, default=3, help="recipes of every width that answer the tasks")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--presets", action="store_true")
    options = parser.parse_args()
    if (options.tasks and options.again) or (options.documents and not options.tasks):
        parser.error("--again goes without --tasks, and --documents with it.")
    if options.presets:
        choose_presets()
    elif not options.render:
        for name in missing():
            print(f"{name}: has no recipe in {RECIPES.name}", file=sys.stderr)
        given = [("--compute", options.compute), ("--tokens", options.tokens), ("--samples", options.samples)]
        if options.tasks:
            given += [("--tasks", options.tasks), ("--documents", options.documents), ("--best", str(options.best))]
            wanted = best(options.bits, options.only, options.best)
        else:
            again = options.again or options.tokens or options.samples  # rows are of other texts
            wanted = pending(options.bits, options.only, bool(again))
        for (where, width), names in by_pass(wanted, options.out).items():
            measure(where, str(width), names, [part for key, value in given if value for part in (key, value)])
    if read_rows("methods"):
        render()
        render_tasks()


if __name__ == "__main__":
    main()
