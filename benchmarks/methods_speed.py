"""How long methods press the re-gauged SmolLM2: the recipes of benchmarks/methods.yaml on both cores, with nothing beside.

    make bench Q=methods_speed                                every recipe, at 4 bits where it has them
    python benchmarks/methods_speed.py --only 'gptq*' comq
    python benchmarks/methods_speed.py --render               only the table, from the rows there are

Recipes run by `bitpress compare` on held-out texts of two windows, as only the pressing counts. What a recipe takes from the pass over
the original is in its time as if it had run the pass for itself: recipes that need the attention's or the loss's statistics share a pass
of their own, so that the others do not wait for these. A row of benchmarks/results/methods_speed.jsonl is one recipe; what has been
timed on a machine of the same code path is not run again unless --again. The arithmetic is what `compute: auto` takes there.
"""

import argparse
import fnmatch
import shutil
import sys
from pathlib import Path
from typing import Any

from method_rows import MODEL, RECIPES
from method_tables import DOCUMENT
from methods import by_pass, compare
from rows import add_row, machine, read_rows, rewrite_section

from bitpress.cli.compare import label
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.settings import cache_directory

QUESTION = "methods_speed"
# Quantizers by how they search, each kind with the seconds that it should press this model in.
CLASSES = {
    "error feedback": (180, {"gptq", "gptaq", "rsq", "boa", "ldlq", "spqr", "mr_gptq"}),
    "coordinate descent": (360, {"quantease", "comq", "aespa", "decoupleq"}),
    "codebooks": (3600, {"aqlm", "pvq", "quip_sharp"}),
}
TOKENS = "1024"


def choose(only: list[str], bits: list[int]) -> list[Variant]:
    """Return every recipe at the first of the widths that it has."""
    candidates, _ = read_candidates(RECIPES, bits)
    first = {candidate.name: candidate for candidate in reversed(candidates)}
    return [c for c in candidates if first[c.name] is c and any(fnmatch.fnmatchcase(c.name, pattern) for pattern in only)]


def measure(candidates: list[Variant], out: Path) -> None:
    known = {(row["name"], row["bits"], row["finished"]) for row in read_rows(QUESTION)}
    kept = (
        "name",
        "bits",
        "recipe",
        "seconds_pressing",
        "seconds_pressing_cpu",
        "seconds_capture",
        "peak_memory_bytes",
        "finished",
    )
    for (where, bits), names in by_pass(candidates, out).items():
        compared = compare(where, str(bits), names, ["--tokens", TOKENS])
        for row in compared["rows"]:
            if row["failed"]:
                print(f"{label(row)}: failed: {row['failed']}", file=sys.stderr)
            elif (row["name"], row["bits"], row["finished"]) not in known:
                add_row(QUESTION, {"model": MODEL, "compute": compared["compute"], **{key: row[key] for key in kept}})


def render() -> None:
    """Write the section `speed` of docs/methods-results.md."""
    found = read_rows(QUESTION)
    if not found:
        return
    path = found[-1]["code_path"]
    rows = list({(row["name"], row["bits"]): row for row in found if row["code_path"] == path}.values())
    some = rows[0]["recipe"]["calibration"]
    lines = [
        "## Speed",
        "",
        f"`{MODEL}` on {rows[0]['threads']} cores with {path} in {rows[0]['compute']}, on an idle machine, calibrated on {some['samples']} windows of",
        f"{some['length']} tokens. **s**: seconds from the loaded model to the last compressed weight, including the pass over the original if the",
        "method needs statistics from it. **quantizing**: the part without that pass. `make bench Q=methods_speed` prints this table; the rows are",
        "in `benchmarks/results/methods_speed.jsonl`.",
        "",
        "| recipe | bits | s | quantizing, s | memory, MB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=total):
        memory = f"{row['peak_memory_bytes'] / 1e6:.0f}"
        lines.append(f"| {row['name']} | {row['bits']} | {total(row):.0f} | {row['seconds_pressing']:.0f} | {memory} |")
    lines.append("")
    for kind, (limit, names) in CLASSES.items():
        alone = [row for row in rows if row["recipe"]["quantizer"]["name"] in names]
        within = [row for row in alone if total(row) <= limit]
        if alone:
            slow = (
                "; over it: " + ", ".join(row["name"] for row in alone if row not in within) if len(within) < len(alone) else ""
            )
            lines.append(f"- {kind}: {len(within)} of {len(alone)} recipes within {limit // 60} minutes{slow}.")
    rewrite_section(DOCUMENT, "speed", lines)


def total(row: dict[str, Any]) -> float:
    return float(row["seconds_pressing"] + row["seconds_capture"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns of recipes")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "methods_speed")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        path = machine()["code_path"]
        timed = {(row["name"], row["bits"]) for row in read_rows(QUESTION) if row["code_path"] == path}
        wanted = [c for c in choose(options.only, options.bits) if options.again or (c.name, c.bits) not in timed]
        if options.again:
            for where, _ in by_pass(wanted, options.out):
                shutil.rmtree(where, ignore_errors=True)
        measure(wanted, options.out)
    render()


if __name__ == "__main__":
    main()
