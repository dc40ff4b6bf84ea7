"""The documents of measured methods: the sections of docs/methods-results.md and README.md, and the picture."""

from collections.abc import Mapping
from typing import Any

from method_rows import BEYOND, MODEL, knows_the_texts, latest, processor_seconds
from rows import ROOT, read_rows, rewrite_section
from yardsticks import baseline_lines, kind_lines, peer_lines

from bitpress.cli.accuracy import by_recipe, percent
from bitpress.cli.compare import ordered
from bitpress.presets import DEFAULT_PRESET, find_preset
from bitpress.report.compare_picture import draw_comparison

__all__ = ["DOCUMENT", "render", "render_tasks"]

DOCUMENT = ROOT / "docs" / "methods-results.md"
# The held-out text of a kind that the built-in calibration mix has not.
UNSEEN = "reference"
SEEN = "speeches"


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


def render_readme(rows: list[dict[str, Any]], peers: list[dict[str, Any]], names: list[str]) -> None:
    """Write the section `methods` of README.md: for 4, 3 and 2 bits the best recipe, what `quantize --bits` takes, and another package."""
    lines = ["| | best recipe | `quantize --bits` | best *other package* |", "|---|---|---|---|"]
    for bits in (4, 3, 2):
        near = [row for row in rows if row["bits"] == bits and row["bits_per_weight"] <= bits + BEYOND]
        taken = find_preset(DEFAULT_PRESET, bits).chosen.name
        own = next(row for row in near if row["name"] == taken)
        peer = next(row for row in peers if bits <= row["bits_per_weight"] < bits + 1)
        cells = [f"{_told(near[0], names)} ({near[0]['name']})", _told(own, names), f"{_told(peer, names)} (*{peer['name']}*)"]
        lines.append(f"| {bits} bits | {' | '.join(cells)} |")
    rewrite_section(ROOT / "README.md", "methods", lines)


def _told(row: dict[str, Any], names: list[str]) -> str:
    """Return the stored bits and the distances of a row."""
    distances = [f"{row['texts'][text]['kl_mean']:.4f}" for text in names]
    return f"{row['bits_per_weight']:.2f}: {' / '.join(distances)}"


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
