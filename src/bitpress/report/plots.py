"""The plots of the report page, as SVG that a browser colors by the page's own variables.

Drawn by matplotlib: it is maintained, draws axes, intervals and logarithmic ticks correctly, and writes static SVG. A page with plotly,
vega-lite or a canvas library would carry 0.2 to 4 MB of script, and show nothing in a mail client or a phone's preview, which run none.
Text stays text, so that it takes the page's font; colors are stand-ins that become CSS variables, so that one file is light and dark.
"""

import logging
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

__all__ = ["Bar", "Course", "Dot", "plot_bars", "plot_course", "plot_front", "plot_positions"]

INK, FAINT, ACCENT, SECOND = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
# Points; a figure this wide has legible text on a phone, where it is shown at about its own width.
WIDTH, LETTERS = 4.2, 8.5
# Letters of a label that have room beside the axes; of longer ones the end is shown.
LONGEST = 26
SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
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


@dataclass(frozen=True)
class Course:
    """How a loss went: means over equal numbers of steps on calibration text, and on held-out text at the start and of what is kept."""

    losses: Sequence[float]
    steps: int
    before: float
    after: float


def plot_course(course: Course, told: str) -> str:
    """Draw a loss over the steps, and the held-out one at its start and behind it."""
    with _settings(told):
        axes = _axes(2.5, left=0.72, bottom=0.45)
        width = course.steps / len(course.losses)
        middles = [width * (k + 0.5) for k in range(len(course.losses))]
        axes.plot(
            middles, course.losses, color=ACCENT, linewidth=1.6, label="calibration", marker="o" if len(middles) < 3 else None
        )
        axes.plot(
            [0, course.steps],
            [course.before, course.after],
            color=SECOND,
            linestyle=":",
            linewidth=1.2,
            marker="o",
            markersize=5,
            label="held out",
        )
        axes.set_xlim(-0.02 * course.steps, 1.04 * course.steps)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, relative")
        axes.locator_params(axis="both", nbins=5)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(True, axis="y")
        axes.legend(frameon=False, loc="best", fontsize=LETTERS)
        return _svg(axes.figure, told)


def plot_bars(bars: Sequence[Bar], told: str) -> str:
    """Draw means one below the other, with their intervals; `told` says what the plot shows."""
    with _settings(told):
        height = 0.55 + 0.27 * len(bars)
        axes = _axes(height, left=0.15 + 0.068 * min(max(len(bar.label) for bar in bars), LONGEST), bottom=0.45)
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
        axes.set_yticks(places, [bar.label if len(bar.label) <= LONGEST else f"…{bar.label[1 - LONGEST :]}" for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(left=min(0.0, *(bar.mean - (bar.half or 0.0) for bar in bars)))
        axes.set_xlabel("KL divergence, nats a token")
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
        axes.grid(True, axis="x")
        return _svg(axes.figure, told)


def plot_positions(bars: Sequence[Bar], told: str) -> str:
    """Draw means from left to right, joined, with their intervals."""
    with _settings(told):
        axes = _axes(2.5, left=0.62, bottom=0.85)
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
        return _svg(axes.figure, told)


def plot_front(dots: Sequence[Dot], told: str) -> str:
    """Draw distance against size, and the line of the models that no other one beats in both."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with _settings(told):
        axes = _axes(3.6, left=0.82, bottom=0.45)
        shown = [dot for dot in dots if dot.kl > 0]
        rows = [{"name": d.name, "bits_per_weight": d.size / 1e6, "kl_mean": d.kl} for d in shown]
        best = front(rows)
        if shown and max(d.kl for d in shown) > 4 * min(d.kl for d in shown):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.plot(
            [row["bits_per_weight"] for row in best], [row["kl_mean"] for row in best], color=SECOND, linewidth=4, alpha=0.35
        )
        names = {row["name"] for row in best}
        for dot in shown:
            half = min(dot.half or 0.0, 0.999 * dot.kl)
            color = ACCENT if dot.name in names else INK
            axes.errorbar([dot.size / 1e6], [dot.kl], yerr=[half], fmt="o", color=color, ecolor=color, capsize=3, markersize=5)
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel("size of the directory, MB")
        axes.set_ylabel("KL divergence, nats a token")
        axes.grid(True)
        _name(axes, shown)
        return _svg(axes.figure, told)


def _axes(height: float, *, left: float, bottom: float) -> Any:
    """Return the axes of a figure with such margins, in inches. matplotlib's own layouts draw everything several times to find them."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height)).add_axes(
        (left / WIDTH, bottom / height, 1 - (left + 0.12) / WIDTH, 1 - (bottom + 0.15) / height)
    )


def _name(axes: Any, dots: Sequence[Dot]) -> None:
    """Write names beside their points where they cover nothing; a name without room is left to the table."""
    axes.autoscale_view()  # where a point lies is known only then
    letter, line = 0.6 * LETTERS, 1.2 * LETTERS
    frame = axes.bbox.bounds
    scale = 72 / axes.figure.dpi  # a pixel in points
    right = (frame[0] + frame[2]) * scale + 8
    points = [tuple(scale * axes.transData.transform((dot.size / 1e6, dot.kl))) for dot in dots]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for dot, (x, y) in zip(dots, points, strict=True):
        width = letter * len(dot.name)
        places = [(dx, dy) for dy in (3, -line, line, -2 * line) for dx in (7, -7 - width)]
        for dx, dy in places:
            box = (x + dx, y + dy, x + dx + width, y + dy + line)
            inside = box[0] > frame[0] * scale and box[2] < right and frame[1] * scale < box[1]
            if inside and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
                taken.append(box)
                axes.annotate(dot.name, (dot.size / 1e6, dot.kl), xytext=(dx, dy), textcoords="offset points")
                break


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Set the look of all plots. A letter that matplotlib's own font lacks is no warning, since browsers have more fonts."""
    import matplotlib

    log = logging.getLogger("matplotlib.font_manager")  # says so when it lists the machine's fonts for the first time
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


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
