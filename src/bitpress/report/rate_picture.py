"""The picture of measured formats: signal-to-noise ratio against stored bits, and below it the distance of each from the bound.

matplotlib takes most of a second to import, so it is imported only for a picture.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.errors import UsageError
from bitpress.evaluation.rate import DB_PER_BIT, best_rows
from bitpress.formats import SHORT

__all__ = ["check_picture", "draw_rates", "family_of"]

SUFFIXES = (".png", ".svg")
# Families get these in turn: colors dark enough for text, and marks; seven and eight, so that a pair repeats late.
COLORS = ("#1f5fa8", "#b8211e", "#1c7a2c", "#6b3fa0", "#b35a00", "#0b7f8c", "#444444")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
# The lower picture shows formats that are at most so many dB worse than the best; what is below is counted.
DEPTH = 10
# What labels leave out, since most formats have it, and the names that the field has for a whole format.
COMMON = "-g64"
SHORTER = {full: short for short, full in SHORT.items()}


def check_picture(target: Path) -> None:
    """Raise UsageError, before hours of work, if a picture cannot be drawn."""
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{target}: a picture must be a .png or .svg file.")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist.")


def family_of(name: str) -> str:
    """Return the family whose color a format gets: `int4-g64-zero` is of int, `e2m1-g64` of eXmY, `mxfp6e3m2-g32` of mxfp."""
    head = name.split("-")[0]
    own = re.match(r"[a-z]\d|[a-z]+", head)  # e8p and e81b are of e8
    return "eXmY" if re.match(r"e\d+m\d+", head) else own[0] if own else head


def draw_rates(measured: Mapping[str, Any], target: Path) -> None:
    """Draw the model's rows into `target`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in best_rows(measured, "model").values() if row["snr_db"] is not None]
    if not rows:
        raise UsageError("every format is exact on these weights; there is nothing to draw.")
    with pyplot.rc_context({"font.size": 8, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(11, 13), dpi=130, height_ratios=(1, 1.6), layout="constrained")
        bits = [row["bits_per_weight"] for row in rows]
        ends = (max(min(bits) - 0.25, 0), max(bits) + 0.25)
        bound = [DB_PER_BIT * end for end in ends]
        upper.plot(ends, bound, color="black", linewidth=1, label="Gaussian bound, 6.02 dB a bit")
        lower.axhline(0, color="black", linewidth=1)
        best = max(-row["gap_db"] for row in rows)
        shown = [row for row in rows if -row["gap_db"] >= best - DEPTH]
        looks = _looks([row["format"] for row in rows])
        for family, (color, mark) in looks.items():
            own = [row for row in rows if family_of(row["format"]) == family]
            x = [row["bits_per_weight"] for row in own]
            style = {"color": color, "marker": mark, "s": 26, "linewidths": 0.4, "edgecolors": "white", "zorder": 3}
            upper.scatter(x, [row["snr_db"] for row in own], label=family, **style)
            lower.scatter(x, [-row["gap_db"] for row in own], **style)
        upper.set_ylabel("signal-to-noise ratio, dB")
        upper.legend(loc="upper left", frameon=False, ncols=4)
        lower.set_ylabel("dB above the bound; 0 is the best that any code can do on independent Gaussian numbers")
        below = len(rows) - len(shown)
        lower.set_xlabel(
            f"bits per weight, from stored bytes; {COMMON[1:]} where a label names no block"
            + (f"; {below} formats are below the range of the lower picture" if below else "")
        )
        lower.set_ylim(min(-row["gap_db"] for row in shown) - 0.4, max(best, 0) + 0.4)
        for axes in (upper, lower):
            axes.set_xlim(*ends)
            axes.grid(True, alpha=0.25)
        weights, matrices = f"{measured['weights']:,} weights", f"{measured['matrices']} matrices"
        upper.set_title(f"{measured['model']}: {weights} of {matrices}, each rounded to its nearest code", loc="left")
        figure.canvas.draw()
        _label(upper, rows, _frontier(rows), "snr_db", 1, looks)
        _label(lower, shown, {row["format"] for row in shown}, "gap_db", -1, looks)
        figure.savefig(target)
        pyplot.close(figure)


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    families = dict.fromkeys(family_of(name) for name in names)
    return {family: (COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]) for i, family in enumerate(families)}


def _frontier(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the formats that no format of fewer bits equals; `rows` are in the order of bits."""
    found, best = set(), float("-inf")
    for row in rows:
        if row["snr_db"] > best:
            best = row["snr_db"]
            found.add(row["format"])
    return found


def _label(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    named: set[str],
    key: str,
    sign: int,
    looks: Mapping[str, tuple[str, str]],
) -> None:
    """Write names beside points where they cover nothing: the best formats first; a name without room is left out."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    frontier = _frontier(rows)
    points = [axes.transData.transform((row["bits_per_weight"], sign * row[key])) for row in rows]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    frame = axes.get_window_extent(renderer)
    wanted = [i for i, row in enumerate(rows) if row["format"] in named]
    order = sorted(wanted, key=lambda i: (rows[i]["format"] not in frontier, rows[i]["gap_db"]))
    for i in order:
        x, y = points[i]
        name = SHORTER.get(rows[i]["format"], rows[i]["format"].replace(COMMON, "", 1))
        text = axes.annotate(
            name,
            (0, 0),
            xycoords="figure pixels",
            fontsize=6.5,
            color=looks[family_of(rows[i]["format"])][0],
            zorder=4,
        )
        box = text.get_window_extent(renderer)
        width, height = box.width, box.height
        text.remove()
        for reach in (7, 14, 24, 36, 50, 66):
            spots = (
                (x + reach, y - height / 2),
                (x - reach - width, y - height / 2),
                (x + reach * 0.7, y + reach * 0.7),
                (x + reach * 0.7, y - reach * 0.7 - height),
                (x - reach * 0.7 - width, y + reach * 0.7),
                (x - reach * 0.7 - width, y - reach * 0.7 - height),
                (x - width / 2, y + reach),
                (x - width / 2, y - reach - height),
            )
            spot = next((s for s in spots if _free((s[0], s[1], s[0] + width, s[1] + height), taken, frame)), None)
            if spot is not None:
                break
        else:
            continue
        taken.append((spot[0], spot[1], spot[0] + width, spot[1] + height))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2} if reach > 7 else None
        at = axes.transData.inverted().transform(spot)
        axes.annotate(
            name,
            (rows[i]["bits_per_weight"], sign * rows[i][key]),
            xytext=tuple(at),
            textcoords="data",
            fontsize=6.5,
            color=looks[family_of(rows[i]["format"])][0],
            arrowprops=line,
            zorder=4,
        )


def _free(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]], frame: Any) -> bool:
    inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )
