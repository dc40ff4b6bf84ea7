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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, add_row, read_rows, rewrite_section
from yardsticks import baseline_lines, kind_lines, peer_lines

from bitpress.calibration import Stats, of_origin
from bitpress.cli.accuracy import by_recipe, percent
from bitpress.cli.compare import label, ordered
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.formats import parse_format
from bitpress.kernels.native_layout import reason_to_expand
from bitpress.pipeline.compose import compress_matrix
from bitpress.pipeline.identity import recorded
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import LayerMethod, Named, build_method, make_recipe
from bitpress.report.compare_picture import draw_comparison
from bitpress.settings import cache_directory

MODEL = "smollm2-135m-regauged"
RECIPES = ROOT / "benchmarks" / "methods.yaml"
DOCUMENT = ROOT / "docs" / "methods-results.md"
# The held-out text of a kind that the built-in calibration mix has not.
UNSEEN = "reference"
SEEN = "speeches"
PRESETS = ROOT / "src" / "bitpress" / "presets.json"


def compare(out: Path, bits: str, only: list[str], options: list[str]) -> dict[str, Any]:
    """Run `bitpress compare` on the bench's model and recipes, and give what it found."""
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
    """Run the comparison and keep the rows that are new; those of recipes that failed are told and not kept."""
    compared = compare(out, bits, only, ["--compute", "bf16", *options])  # rows of all machines in the same arithmetic
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


def meant(row: dict[str, Any]) -> dict[str, Any]:
    """Return the method of a row's recipe with the settings that have come since, as they are by default."""
    return keys_of(recorded(build_method(make_recipe(keys_of(row["recipe"])))))


def missing() -> list[str]:
    """Name the quantizers that no recipe uses."""
    candidates, _ = read_candidates(RECIPES, range(1, 9))
    return sorted(set(QUANTIZERS) - {candidate.recipe.quantizer_name for candidate in candidates})


def latest(kind: str = "recipe") -> list[dict[str, Any]]:
    """The newest row of every recipe (or peer) and width, of those that saw the same model and texts as the newest recipe."""

    def seen(row: dict[str, Any]) -> tuple[Any, ...]:
        calibration = row["recipe"]["calibration"]
        return row["model"], row["sources"], calibration["samples"], calibration["length"]

    rows = [row for row in read_rows("methods") if row["kind"] in ("recipe", "peer")]
    newest = next((row for row in reversed(rows) if row["kind"] == "recipe"), None)
    if newest is None:
        return []
    return list({(r["name"], r["bits"]): r for r in rows if r["kind"] == kind and seen(r) == seen(newest)}.values())


def render_tasks() -> None:
    """Write the section `tasks` of docs/methods-results.md: the newest answers of the original and of every recipe that was asked."""
    rows = [row for row in read_rows("methods") if row["kind"] == "tasks" and row["model"] == MODEL]
    if not rows:
        return
    newest = {row["task"]: row["documents"] for row in rows}
    answers = by_recipe([row for row in rows if row["documents"] == newest[row["task"]]])
    measured = {(row["name"], row["bits"]): row for row in latest()}
    asked = [row for row in ordered(list(measured.values())) if (row["name"], row["bits"]) in answers]
    heads = " | ".join(f"{task} | by length" for task in newest)
    read = ", ".join(f"the first {documents} questions of `{task}`" for task, documents in newest.items())
    lines = [
        "## On tasks",
        "",
        f"`{MODEL}` on {read}: per cent of right answers without examples, ± one standard error. *By length* compares the likelihood per",
        "character of a choice. The recipes are those with the least KL at each number of bits. `python benchmarks/methods.py --tasks",
        "arc-easy,piqa` prints this table.",
        "",
        f"| recipe | bits | KL | {heads} |",
        f"|---|---|---|{'---|---|' * len(newest)}",
        task_line("original", "16", "0", answers.get((None, None), {}), list(newest)),
    ]
    for row in asked:
        own = answers[row["name"], row["bits"]]
        lines.append(task_line(row["label"], f"{row['bits_per_weight']:.3f}", f"{row['kl_mean']:.4f}", own, list(newest)))
    rewrite_section(DOCUMENT, "tasks", lines)


def task_line(name: str, bits: str, kl: str, own: Mapping[str, Mapping[str, Any]], tasks: list[str]) -> str:
    cells = [name, bits, kl]
    cells += [percent(own[task], key) if task in own else "" for task in tasks for key in ("acc", "acc_norm")]
    return f"| {' | '.join(cells)} |"


def render() -> None:
    """Write the sections of docs/methods-results.md, that of README.md, and docs/methods.svg."""
    rows, peers = latest(), latest("peer")
    if not rows:
        return
    some = rows[0]
    read = ", ".join(f"{text['tokens']:,} tokens of {name} (`{text['source']}`)" for name, text in some["sources"].items())
    samples = some["recipe"]["calibration"]
    noise = (
        f" The original in {some['compute']} is {some['noise']['kl_mean']:.2g} nats per token away from itself in fp32."
        if some["noise"]["texts"]
        else ""
    )
    originals = ", ".join(f"{float(figures['perplexity_original']):.2f} on {name}" for name, figures in some["texts"].items())
    lines = [
        f"`{some['model']}` (SmolLM2 with weights that lie on no grid), all linear layers of the blocks. Calibration: {samples['samples']} windows of",
        f"{samples['length']} built-in tokens; **inputs** says whether a block's inputs come from the original or from the compressed blocks before it.",
        f"**KL** from the original in nats per token, ± half a 95 % interval over windows, on {read}.",
        f"Perplexity of the original: {originals}.{noise} **bits** count every stored byte. **error**: mean relative error of the layers' outputs.",
        "Rows of one group are in the order of their KL; a star marks a recipe that no other beats in both bits and KL. **s** are processor",
        "seconds of both cores together, without the pass over the original that recipes share. `make bench Q=methods` prints this table; the",
        "recipes are in `benchmarks/methods.yaml`, the rows in `benchmarks/results/methods.jsonl`.",
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
    lines = [
        f"| package | weights | bits | {' | '.join(f'KL, {name} | top token | perplexity' for name in names)} | error | inputs | s |",
        f"|---|---|---|{'---|---|---|' * len(names)}---|---|---|",
        *(line({**row, "front": False}, names) for row in ordered(peers)),
    ]
    lines += ["", *peer_lines(ordered(rows), ordered(peers), UNSEEN)]
    rewrite_section(DOCUMENT, "peers", lines)
    rewrite_section(DOCUMENT, "baselines", baseline_lines(ordered(rows), UNSEEN))
    rewrite_section(DOCUMENT, "kinds", kind_lines(ordered(rows), ordered(peers), UNSEEN, SEEN))
    fair = [row for row in rows if not knows_the_texts(row)]
    render_readme(ordered(fair), ordered(peers), names)
    picture = draw_comparison([*fair, *peers], f"{some['model']}: what methods cost, with other packages")
    (ROOT / "docs" / "methods.svg").write_text(picture, encoding="utf-8")


def render_readme(rows: list[dict[str, Any]], peers: list[dict[str, Any]], names: list[str]) -> None:
    """Write the section `methods` of README.md: for 4, 3 and 2 bits the best recipe, the default, another package and rounding."""
    lines = [
        f"| | stored bits | {' | '.join(f'KL, {name}' for name in names)} | same top token, {names[0]} |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for bits in (4, 3, 2):
        near = [row for row in rows if row["bits"] == bits and row["bits_per_weight"] <= bits + BEYOND]
        shown = [*near[:1], *(row for row in near[1:] if row["name"] in YARDSTICKS)]
        shown += [row for row in peers if bits <= row["bits_per_weight"] < bits + 1][:1]
        for row in sorted(shown, key=lambda r: r["kl_mean"]):
            name = row["label"] if row["kind"] == "recipe" else f"*{row['label']}*"
            texts = [row["texts"][text] for text in names]
            cells = [name, f"{row['bits_per_weight']:.2f}", *(f"{text['kl_mean']:.4f}" for text in texts)]
            lines.append(f"| {' | '.join(cells)} | {100 * texts[0]['top1_agreement']:.1f} % |")
    rewrite_section(ROOT / "README.md", "methods", lines)


def knows_the_texts(row: dict[str, Any]) -> bool:
    """Whether the bits of a recipe's layers were chosen for this model, on a part of the evaluation texts."""
    return bool(row["recipe"].get("overrides"))


# Stored bits a preset may have beyond its name's: scales and zero points of groups of 64 are 0.31.
BEYOND = 0.5
# Seconds on 2 cores that "balanced" may press the bench's model for.
BALANCED = 180
RULES = {
    "fast": "The recipe with the least KL of those that need no calibration",
    "balanced": f"The recipe with the least KL of those that quantize the bench's model in at most {BALANCED} seconds on 2 cores",
    "best": "The recipe with the least KL",
}
# Recipes that the README shows however they did.
YARDSTICKS = ("default of quantize", "rtn")
SHARED_RULE = (
    f"Recipes count if they store at most {BEYOND} bits a weight beyond the codes, in layouts that the native engine reads directly, "
    "with no bits chosen layer by layer"
)


def choose_presets() -> None:
    """Write src/bitpress/presets.json."""
    rows = [row for row in latest() if row["bits"] is not None and not knows_the_texts(row) and not reason_to_expand_of(row)]
    some = rows[0]
    samples, texts = some["recipe"]["calibration"], some["sources"]
    read = " and ".join(f"{text['tokens']:,} held-out tokens of {name}" for name, text in texts.items())
    bench = f"{some['model']}, calibrated on {samples['samples']} windows of {samples['length']} built-in tokens; KL on {read}"
    choices: dict[str, dict[str, Any]] = {name: {} for name in RULES}
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        fit = sorted(
            (r for r in rows if r["bits"] == bits and r["bits_per_weight"] <= bits + BEYOND), key=lambda r: r["kl_mean"]
        )
        allowed = {
            "fast": [row for row in fit if row["calibration"] is None],
            "balanced": [row for row in fit if seconds(row) <= BALANCED],
            "best": fit,
        }
        for name, those in allowed.items():
            if those:
                choices[name][str(bits)] = {
                    "recipe": keys_of(those[0]["recipe"]),
                    "chosen": figures(those[0]),
                    "others": [figures(row) for row in those[1:6]],
                }
    rules = {name: f"{rule}. {SHARED_RULE}" for name, rule in RULES.items()}
    table = {"bench": bench, "rules": rules, "choices": choices}
    PRESETS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def reason_to_expand_of(row: dict[str, Any]) -> str | None:
    """Say what of a recipe's weights the native engine would decode to 16 bits, by trying a small one."""
    recipe = make_recipe(keys_of(row["recipe"]))
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 768, generator=generator), torch.randn(512, 768, generator=generator)
    gram, heads = x.T @ x / 512, 4
    stats = Stats(
        512,
        gram=gram,
        mean_abs=x.abs().mean(0),
        cross=gram,
        attention_gram=gram,
        row_gram=torch.eye(64 // heads).expand(heads, -1, -1),
        head_gram=gram.expand(heads, -1, -1),
        sensitivity=torch.rand(w.shape, generator=generator),
    )
    made = compress_matrix(
        w,
        stats,
        LayerMethod(
            parse_format(recipe.weights),
            Named("quantizer", "", build_method(recipe).quantizer.part),
            changes=tuple([change for _, change in [(p.name, p.part) for p in build_method(recipe).changes]]),
            corrections=tuple([correction for _, correction in [(p.name, p.part) for p in build_method(recipe).corrections]]),
            targets=tuple([target for _, target in [(p.name, p.part) for p in build_method(recipe).of("target")]]),
        ),
    )
    return reason_to_expand(made.weight)


def keys_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what of a recipe is the method's own."""
    found = {key: recipe[key] for key in ("weights", "transforms", "quantizer", "corrections")}
    calibration = {key: value for key, value in recipe["calibration"].items() if key in ("inputs", "sequential")}
    return {**found, "calibration": calibration}


def processor_seconds(row: dict[str, Any]) -> float:
    """Processor seconds of pressing; for a row without them the most that its threads can have had."""
    return float(row.get("seconds_pressing_cpu") or row["seconds_pressing"] * row["threads"])


def seconds(row: dict[str, Any]) -> float:
    """Seconds of pressing on 2 cores, if two press twice as fast as one."""
    return processor_seconds(row) / 2


def figures(row: dict[str, Any]) -> dict[str, Any]:
    kl = {name: round(text["kl_mean"], 5) for name, text in row["texts"].items()}
    return {"name": row["name"], "bits": round(row["bits_per_weight"], 4), "kl": kl, "seconds": round(seconds(row))}


def line(row: dict[str, Any], names: list[str]) -> str:
    cells = [f"{row['label']}{' *' if row['front'] else ''}", row["weights"], f"{row['bits_per_weight']:.3f}"]
    for name in names:
        figures = row["texts"][name]
        width = "" if figures["kl_ci95"] is None else f" ± {figures['kl_ci95']:.4f}"
        cells += [f"{figures['kl_mean']:.4f}{width}", f"{100 * figures['top1_agreement']:.1f} %", perplexity(figures)]
    cells += ["-" if row["error"] is None else f"{row['error']:.4g}", row["inputs"] or "-"]
    cells.append("-" if row["seconds_pressing"] is None else f"{processor_seconds(row):.0f}")
    return f"| {' | '.join(cells)} |"


def perplexity(figures: Mapping[str, Any]) -> str:
    value = figures["perplexity"]
    return "inf" if value in (None, "inf") else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names or patterns of recipes")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--again", action="store_true", help="also those that have a row; what --out holds is taken from there")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "methods")
    parser.add_argument("--tokens", help="of every held-out text; rows of other numbers are not put in one table")
    parser.add_argument("--samples", help="calibration windows")
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
        given = [("--tokens", options.tokens), ("--samples", options.samples)]
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
