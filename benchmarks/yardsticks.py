"""What recipes are held against: each its own baseline at equal bits, and the best of them every other package.

baselines.yaml names the baseline of every recipe, and says why one that does not beat it here does not.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rows import ROOT

__all__ = ["baseline_lines", "kind_lines", "peer_lines", "unexplained"]

BASELINES = ROOT / "benchmarks" / "baselines.yaml"
# Nats a token at which what a model says has nothing to do with the original's words, and KL orders nothing.
BEYOND_USE = 2.0
Row = Mapping[str, Any]


def read_baselines() -> dict[str, dict[str, str]]:
    known: dict[str, dict[str, str]] = yaml.safe_load(BASELINES.read_text(encoding="utf-8"))
    return known


def at_bits(rows: Sequence[Row], bits: float, text: str) -> tuple[float, bool] | None:
    """Return the KL that a recipe's rows come to at stored bits, log KL linear between them; whether that is between two of them."""
    points = sorted((row["bits_per_weight"], math.log(row["texts"][text]["kl_mean"])) for row in rows)
    if not points:
        return None
    if len(points) == 1:
        return math.exp(points[0][1]), abs(points[0][0] - bits) < 0.02
    over = next((i for i, (b, _) in enumerate(points) if b >= bits), len(points) - 1)
    (b0, k0), (b1, k1) = points[max(over, 1) - 1], points[max(over, 1)]
    inside = points[0][0] - 0.02 <= bits <= points[-1][0] + 0.02
    return math.exp(k0 + (k1 - k0) * (bits - b0) / (b1 - b0)), inside


def compared(rows: Sequence[Row], text: str) -> list[dict[str, Any]]:
    """Hold every row against its baseline at its bits."""
    known = read_baselines()
    found = []
    for row in rows:
        entry = known.get(row["name"])
        base = (
            None if entry is None else at_bits([r for r in rows if r["name"] == entry["beats"]], row["bits_per_weight"], text)
        )
        if entry is not None and base is not None:
            ratio = row["texts"][text]["kl_mean"] / base[0]
            found.append(
                {**row, "beats": entry["beats"], "base": base[0], "inside": base[1], "ratio": ratio, "why": entry.get("why")}
            )
    return found


def unexplained(rows: Sequence[Row], text: str) -> list[str]:
    """Name the recipes that are clearly worse than their baseline at some width, and of which nobody has said why."""
    return sorted(
        {row["name"] for row in compared(rows, text) if row["ratio"] >= 1 and not row["why"] and not level(row, text)}
    )


def level(row: Row, text: str) -> bool:
    """Whether a row is no further from its baseline than its own 95 % interval."""
    figures = row["texts"][text]
    return figures["kl_ci95"] is not None and abs(figures["kl_mean"] - row["base"]) <= figures["kl_ci95"]


def baseline_lines(rows: Sequence[Row], text: str) -> list[str]:
    """Return the table of rows beside their baselines, and a line for every recipe that does not beat its own."""
    held = compared(rows, text)
    lines = [
        f"KL on {text}, a kind of text that calibration never saw, against the KL of the baseline at the same stored bits. Between two measured",
        "rows of the baseline, log KL is interpolated linearly; `~` marks bits outside of its rows.",
        "",
        "| recipe | bits | KL | baseline | its KL | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(held, key=lambda r: (-(r["bits"] or 0), r["ratio"])):
        about = "" if row["inside"] else "~"
        cells = [row["label"], f"{row['bits_per_weight']:.3f}", f"{row['texts'][text]['kl_mean']:.4f}", row["beats"]]
        lines.append(f"| {' | '.join(cells)} | {about}{row['base']:.4f} | {row['ratio']:.2f} |")
    behind: dict[str, list[dict[str, Any]]] = {}
    for row in held:
        if row["ratio"] >= 1:
            behind.setdefault(row["name"], []).append(row)
    if behind:
        lines += ["", "Recipes that do not beat their baseline here:", ""]
    for name, missed in behind.items():
        widths = ", ".join(f"{row['ratio']:.2f} at {row['bits']}" for row in sorted(missed, key=lambda r: -(r["bits"] or 0)))
        lines.append(f"* `{name}` ({widths} bits, of {missed[0]['beats']}): {reason(missed, text)}")
    for name in unexplained(rows, text):
        print(f"{name}: does not beat its baseline; say why in {BASELINES.name}", file=sys.stderr)
    return lines


def reason(missed: Sequence[Row], text: str) -> str:
    if all(level(row, text) for row in missed):
        return "level with it, within the 95 % interval."
    return str(missed[0]["why"] or "not looked into yet.")


def kind_lines(rows: Sequence[Row], peers: Sequence[Row], unseen: str, seen: str) -> list[str]:
    """Return a table of how much more a recipe costs on a kind of text that calibration never saw, by width.

    One that reads no text shows what the texts themselves differ by. Rows beyond use (KL over 2) are left out.
    """
    by_name: dict[str, dict[int, Row]] = {}
    for row in (*rows, *peers):
        if row["bits"] and row["texts"][unseen]["kl_mean"] <= BEYOND_USE:
            by_name.setdefault(row["name"], {})[row["bits"]] = row
    widths = sorted({bits for found in by_name.values() for bits in found}, reverse=True)
    lines = [
        f"KL on {unseen}, a kind of text that calibration never saw, divided by KL on {seen}, a kind that it saw. Recipes that read no text show",
        f"by how much the two kinds differ anyway. Rows with a KL over {BEYOND_USE:g} are left out.",
        "",
        f"| recipe or *package* | inputs | {' | '.join(f'{bits} bits' for bits in widths)} |",
        f"|---|---|{'---|' * len(widths)}",
    ]
    ratios = {
        name: {bits: row["texts"][unseen]["kl_mean"] / row["texts"][seen]["kl_mean"] for bits, row in found.items()}
        for name, found in by_name.items()
    }
    for name, found in sorted(ratios.items(), key=lambda item: -math.fsum(item[1].values()) / len(item[1])):
        some = next(iter(by_name[name].values()))
        cells = [f"*{name}*" if some["kind"] == "peer" else name, some["inputs"] or "-"]
        cells += [f"{found[bits]:.2f}" if bits in found else "" for bits in widths]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peer_lines(rows: Sequence[Row], peers: Sequence[Row], text: str) -> list[str]:
    """Return the best recipe of no more bits, to a hundredth of a bit, beside every row of another package."""
    lines = [
        f"| package | bits | KL, {text} | best recipe of no more bits | its bits | its KL | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer in peers:
        fit = [row for row in rows if row["bits_per_weight"] <= peer["bits_per_weight"] + 0.01]
        theirs = peer["texts"][text]["kl_mean"]
        cells = [peer["label"], f"{peer['bits_per_weight']:.3f}", f"{theirs:.4f}"]
        if fit:
            best = min(fit, key=lambda r: r["texts"][text]["kl_mean"])
            ours = best["texts"][text]["kl_mean"]
            cells += [best["label"], f"{best['bits_per_weight']:.3f}", f"{ours:.4f}", f"{ours / theirs:.2f}"]
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return lines
