"""The plots of the report page, as SVG that a browser colors by the page's own variables.

Drawn by matplotlib: it is maintained, draws axes, intervals and logarithmic ticks correctly, and writes static SVG. A page with plotly,
vega-lite or a canvas library would carry 0.2 to 4 MB of script, and show nothing in a mail client or a phone's preview, which run none.
Text stays text, so that it takes the page's font; colors are stand-ins that become CSS variables, so that one file is light and dark.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from bitpress.report.compare_picture import front

__all__ = ["Bar", "Dot", "plot_bars", "plot_front", "plot_positions"]

INK, FAINT, ACCENT, SECOND = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
# Points; a figure this wide has legible text on a phone, where it is shown at about its own width.
WIDTH, LETTERS = 4.7, 8.5
SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": LETTERS,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Bar:
    """A labelled mean with half its interval, if it has one."""

    label: str
    mean: float
    half: float | None


@dataclass(frozen=True)
class Dot:
    """A model of a comparison: its size in bytes, its distance, half the interval of that."""

    name: str
    size: int
    kl: float
    half: float | None


def plot_bars(bars: Sequence[Bar], told: str) -> str:
    """Draw means one below the other, with their intervals; `told` says what the plot shows."""
    from matplotlib.figure import Figure

    with _settings(told):
        figure = Figure(figsize=(WIDTH, 0.55 + 0.27 * len(bars)), layout="constrained")
        axes = figure.subplots()
        places = range(len(bars))
        axes.errorbar(
            [bar.mean for bar in bars],
            places,
            xerr=[bar.half or 0.0 for bar in bars],
            fmt="o",
            color=ACCENT,
            ecolor=ACCENT,
            capsize=3,
            markersize=5,
        )
        axes.set_yticks(places, [bar.label for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(left=min(0.0, *(bar.mean - (bar.half or 0.0) for bar in bars)))
        axes.set_xlabel("KL divergence, nats a token")
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
        axes.grid(True, axis="x")
        return _svg(figure, told)


def plot_positions(bars: Sequence[Bar], told: str) -> str:
    """Draw means from left to right, joined, with their intervals."""
    from matplotlib.figure import Figure

    with _settings(told):
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        places = list(range(len(bars)))
        means, halves = [bar.mean for bar in bars], [bar.half or 0.0 for bar in bars]
        axes.fill_between(
            places,
            [m - h for m, h in zip(means, halves, strict=True)],
            [m + h for m, h in zip(means, halves, strict=True)],
            color=ACCENT,
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(places, means, color=ACCENT, marker="o", markersize=4, linewidth=1.4)
        axes.set_xticks(places, [bar.label for bar in bars], rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlabel("position in the window")
        axes.set_ylabel("KL, nats")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.set_ylim(bottom=min(0.0, *means))
        axes.grid(True, axis="y")
        return _svg(figure, told)


def plot_front(dots: Sequence[Dot], told: str) -> str:
    """Draw distance against size, and the line of the models that no other one beats in both."""
    from matplotlib.figure import Figure

    with _settings(told):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        shown = [dot for dot in dots if dot.kl > 0]
        rows = [{"name": d.name, "bits_per_weight": d.size / 1e6, "kl_mean": d.kl} for d in shown]
        best = front(rows)
        if shown and max(d.kl for d in shown) > 4 * min(d.kl for d in shown):
            axes.set_yscale("log")
        axes.plot(
            [row["bits_per_weight"] for row in best], [row["kl_mean"] for row in best], color=SECOND, linewidth=4, alpha=0.35
        )
        names = {row["name"] for row in best}
        for dot in shown:
            at, half = dot.size / 1e6, min(dot.half or 0.0, 0.999 * dot.kl)
            color = ACCENT if dot.name in names else INK
            axes.errorbar([at], [dot.kl], yerr=[half], fmt="o", color=color, ecolor=color, capsize=3, markersize=5)
            axes.annotate(dot.name, (at, dot.kl), xytext=(6, 4), textcoords="offset points", fontsize=LETTERS - 1)
        if shown:
            sizes = [d.size / 1e6 for d in shown]
            room = (max(sizes) - min(sizes) or max(sizes)) * 0.08
            axes.set_xlim(min(sizes) - room, max(sizes) + 4 * room)
        axes.set_xlabel("size of the directory, MB")
        axes.set_ylabel("KL divergence, nats a token")
        axes.grid(True)
        return _svg(figure, told)


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Set the look of all plots. A letter that matplotlib's own font lacks is no warning, since browsers have more fonts."""
    import matplotlib

    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _svg(figure: Any, told: str) -> str:
    """Write a figure as an element of the page."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    sizes = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert sizes is not None
    width, height = (math.ceil(float(size)) for size in sizes.groups())
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}" class="plot">'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("xlink:href=", "href=").rstrip()
