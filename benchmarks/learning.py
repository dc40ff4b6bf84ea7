"""What learning buys: every recipe of benchmarks/methods.yaml that learns, and the same recipe without it.

    make bench Q=learning                                            bitpress-tiny at 3 and 2 bits
    python benchmarks/learning.py --models smollm2-135m-regauged --bits 3 --only 'gptq*' signround   six of its blocks, the others as they are
    python benchmarks/learning.py --practices                        one way to learn, one part of it changed at a time
    python benchmarks/learning.py --render                           only the tables, from the rows there are

A row of benchmarks/results/learning.jsonl is one recipe on one model: KL on both held-out texts, and the loss of the blocks on calibration
text and on held-out windows of it, before and after; the difference of these two shows what was learned by heart. Recipes have fewer steps
and windows a step than their papers, as many for each: --steps, --batch. The recipes that are written for a run stand beside its results.
"""

import argparse
import copy
import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rows import ROOT, add_row, read_rows, rewrite_section

from bitpress.checkpoints.named import resolve_model
from bitpress.settings import cache_directory

RECIPES = ROOT / "benchmarks" / "methods.yaml"
PRACTICES = ROOT / "benchmarks" / "practices.yaml"
PAGE = ROOT / "docs" / "tuning.md"
# Blocks of a model with more than these that are compressed; the others stay as they are.
QUICK = (0, 1, 9, 15, 22, 29)
START = "before "
# What a row tells of the loss, at first and at last.
LOSSES = (("calibration_first", "calibration_last"), ("held_out_before", "held_out_after"))


def learning_recipes(only: list[str]) -> dict[str, dict[str, Any]]:
    """Return the recipes with a tuning, each followed by itself without one, by name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(RECIPES.read_text(encoding="utf-8"))
    wanted = {
        name: recipe
        for name, recipe in found.items()
        if "tuning" in recipe and (not only or any(fnmatch.fnmatch(name, pattern) for pattern in only))
    }
    made: dict[str, dict[str, Any]] = {}
    for name, recipe in wanted.items():
        start = {key: value for key, value in recipe.items() if key != "tuning"}
        if start not in made.values():
            made[f"{START}{name}"[:60]] = start
        own = [{"name": one} if isinstance(one, str) else one for one in recipe["tuning"]]  # as many steps for each
        made[name] = {**recipe, "tuning": [{k: v for k, v in one.items() if k not in ("steps", "batch")} for one in own]}
    return made


def practices(only: list[str]) -> dict[str, dict[str, Any]]:
    """Return the recipes that differ in one part of how they learn, by name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(PRACTICES.read_text(encoding="utf-8"))
    return {name: r for name, r in found.items() if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)}


def shortened(recipe: dict[str, Any], steps: int, batch: int, skip: list[str]) -> dict[str, Any]:
    """Return a recipe with so many steps of so many windows, and blocks left as they are."""
    made = copy.deepcopy(recipe)
    if "tuning" in made:
        named = [{"name": one} if isinstance(one, str) else one for one in made["tuning"]]
        made["tuning"] = [{"steps": steps, "batch": batch, **one} for one in named]
    if skip:
        made["skip"] = [*made.get("skip", []), *skip]
    return made


def left_out(model: str) -> list[str]:
    """Return the patterns of the blocks that stay: none of a model with at most as many blocks as the quick ones."""
    config = json.loads((resolve_model(model) / "config.json").read_text(encoding="utf-8"))
    blocks = int(config["num_hidden_layers"])
    return [] if blocks <= len(QUICK) else [f"*.layers.{i}.*" for i in range(blocks) if i not in QUICK]


def measure(model: str, options: argparse.Namespace) -> None:
    kind = "practices" if options.practices else "recipes"
    out = options.out / f"{model}-{kind}-{options.steps}x{options.batch}"
    out.mkdir(parents=True, exist_ok=True)
    skip, recipes = left_out(model), out / "recipes.yaml"
    wanted = practices(options.only) if options.practices else learning_recipes(options.only)
    made = {name: shortened(r, options.steps, options.batch, skip) for name, r in wanted.items()}
    recipes.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "bitpress", "compare", model, str(out / "comparison"), "--recipes", str(recipes), "--json"]
    command += ["--bits", options.bits, "--tokens", str(options.tokens), "--samples", str(options.samples)]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    finally:  # a comparison that was stopped has rows too, and goes on with the others
        shared = {"table": kind, "model": model, "blocks": list(QUICK) if skip else "all"}
        keep(out / "comparison", {**shared, "steps": options.steps, "batch": options.batch})
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}")


def keep(comparison: Path, shared: dict[str, Any]) -> None:
    """Keep the rows of a comparison that are new; recipes that failed are printed."""
    results = comparison / "results.jsonl"
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    floors = [row for row in found if row["kind"] == "floor"]
    known = {(row["name"], row["finished"]) for row in read_rows("learning")}
    for row in (row for row in found if row["kind"] == "recipe"):
        if row["failed"]:
            print(f"{row['name']}, {row['bits']} bits: failed: {row['failed']}", file=sys.stderr)
        elif (row["name"], row["finished"]) not in known:
            compute = json.loads((comparison / "compare.json").read_text(encoding="utf-8"))["compute"]
            add_row("learning", {**shared, "compute": compute, "noise": floors[0] if floors else None, **row})


def render() -> None:
    """Write the tables of docs/tuning.md: recipes of one model and width beside each other, by their KL."""
    for kind, section in (("recipes", "measured learning"), ("practices", "measured practices")):
        rows = {(*_group(row), row["name"]): row for row in read_rows("learning") if row.get("table", "recipes") == kind}
        rewrite_section(PAGE, section, [*(_tables(list(rows.values())) or ["", "Not measured yet."]), ""])


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for group in dict.fromkeys(map(_group, rows)):
        alike, (model, bits, *_) = [row for row in rows if _group(row) == group], group
        blocks = "all blocks" if alike[0]["blocks"] == "all" else f"blocks {', '.join(map(str, alike[0]['blocks']))}"
        size = f"{alike[0]['batch']} {'window' if alike[0]['batch'] == 1 else 'windows'} of 512 tokens"
        width = "" if bits is None else f", {bits} bits"
        lines += ["", f"`{model}`, {blocks}{width}, {alike[0]['steps']} steps of {size}:", ""]
        texts = list(alike[0]["texts"])
        lines.append(
            f"| recipe | bits | {' | '.join(f'KL, {text}' for text in texts)} | loss, calibration | loss, held out | processor s |"
        )
        lines.append(f"|---|---|{'---|' * len(texts)}---|---|---|")
        lines += [_line(row, texts) for row in sorted(alike, key=lambda row: float(row["kl_mean"]))]
    return lines


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["bits"], row["steps"], row["batch"]


def _line(row: dict[str, Any], texts: list[str]) -> str:
    learned = row.get("learned")
    losses = ["", ""]
    if learned:
        losses = [f"{learned[first]:.3g} → {learned[last]:.3g}" for first, last in LOSSES]
    figures = [f"{row['texts'][text]['kl_mean']:.3g}" for text in texts]
    cells = [row["name"], f"{row['bits_per_weight']:.2f}", *figures, *losses, f"{row['seconds_pressing_cpu']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["bitpress-tiny"])
    parser.add_argument("--only", nargs="*", default=[], help="names or patterns of recipes")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="windows a step")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=8192, help="of every held-out text")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "learning")
    parser.add_argument("--practices", action="store_true", help="benchmarks/practices.yaml in place of the recipes that learn")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        for model in options.models:
            measure(model, options)
    render()


if __name__ == "__main__":
    main()
