"""The picture of a comparison, as SVG: KL divergence on a logarithmic axis against stored bits, and the front that no recipe beats.

Lengths are in pixels; widths of words are estimated, since no font is known here.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["draw_comparison", "front"]

# Recipes get these in turn: colors dark enough for text, and marks; seven and eight, so that a pair repeats late.
COLORS = ("#1f5fa8", "#b8211e", "#1c7a2c", "#6b3fa0", "#b35a00", "#0b7f8c", "#444444")
MARKS = ("circle", "square", "up", "diamond", "down", "plus", "cross", "star")
LEFT, TOP, WIDTH, LEAST_HEIGHT = 64, 44, 760, 520
LINE, LEGEND, LETTER, BOLD = 17, 250, 6.1, 6.8
INK, FAINT = "#222222", "#dddddd"
# With more names than this, all recipes share one look and all other packages another.
CROWD = 24
CROWD_LOOKS = {"recipe": ("#1f5fa8", "circle"), "peer": ("#b35a00", "square")}
FRONTS = {"recipe": "#f0c040", "peer": "#c8c8c8"}

Row = Mapping[str, Any]
Box = tuple[float, float, float, float]


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row equals in KL at as few bits, from few bits to many."""
    found: list[Row] = []
    best = math.inf
    for row in sorted(_measured(rows), key=lambda r: (r["bits_per_weight"], r["kl_mean"])):
        if row["kl_mean"] < best:
            best = row["kl_mean"]
            found.append(row)
    return found


def draw_comparison(rows: Sequence[Row], title: str) -> str:
    """Draw the rows that have a distance above zero; if there are none, draw a picture that says so.

    Rows of kind "peer" belong to other packages and have a front of their own.
    """
    shown = [row for row in _measured(rows) if row["kl_mean"] > 0]
    names = list(dict.fromkeys(str(row["name"]) for row in shown))
    crowded = len(names) > CROWD
    height = 720 if crowded else max(LEAST_HEIGHT, LINE * len(names) + 20)
    whole, legend_at = (LEFT + WIDTH + 24, LEFT + WIDTH - 130) if crowded else (LEFT + WIDTH + LEGEND, LEFT + WIDTH + 22)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {TOP + height + 56}" '
        f'width="{whole}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    if not shown:
        return "\n".join([*parts, f'<text x="{LEFT}" y="{TOP + 20}">nothing to draw: no recipe has a distance</text></svg>'])
    axes = _Axes(shown, height)
    parts += axes.draw()
    kinds = {str(row["name"]): _kind(row) for row in shown}
    looks = {name: (COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}
    legend = looks
    if crowded:
        looks = {name: CROWD_LOOKS[kinds[name]] for name in names}
        legend = {"recipes": CROWD_LOOKS["recipe"]}
        legend |= {"other packages": CROWD_LOOKS["peer"]} if "peer" in kinds.values() else {}
    for kind in ("peer", "recipe"):
        parts += _front_line(axes, front([row for row in shown if _kind(row) == kind]), FRONTS[kind])
    opacity = 0.0 if crowded else 0.5 if len(names) <= 12 else 0.2  # of the lines between one recipe's widths
    for name in names:
        parts += _series(axes, [row for row in shown if row["name"] == name], *looks[name], opacity)
    parts += _labels(axes, shown, looks, (legend_at - 10, TOP, whole, TOP + 20 + LINE * len(legend)))
    for i, (name, (color, mark)) in enumerate(legend.items()):
        y = TOP + 10 + i * LINE
        parts.append(_mark(legend_at, y, mark, color))
        parts.append(f'<text x="{legend_at + 12}" y="{y + 4}" fill="{color}">{escape(_short(name, 36))}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axes:
    """Maps bits and KL to coordinates in the picture."""

    def __init__(self, rows: Sequence[Row], height: float) -> None:
        bits = [row["bits_per_weight"] for row in rows]
        logs = [math.log10(row["kl_mean"]) for row in rows]
        self.low, self.high = max(min(bits) - 0.3, 0.0), max(bits) + 0.3
        self.bottom, self.top = min(logs) - 0.12, max(logs) + 0.12
        self.height = height

    def x(self, bits: float) -> float:
        return LEFT + float(WIDTH * (bits - self.low) / (self.high - self.low))

    def y(self, kl: float) -> float:
        share = (math.log10(kl) - self.bottom) / (self.top - self.bottom)
        return TOP + self.height * (1 - min(max(share, 0.0), 1.0))

    def draw(self) -> list[str]:
        bottom = TOP + self.height
        parts = []
        step = next(s for s in (0.25, 0.5, 1.0, 2.0, 4.0) if (self.high - self.low) / s <= 14)
        for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            x = self.x(k * step)
            parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{FAINT}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{k * step:g}</text>')
        for value, named in _ticks(self.bottom, self.top):
            y = self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="{FAINT}"/>')
            if named:
                parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDTH}" stroke="{INK}" fill="none"/>')
        middle = TOP + self.height / 2
        parts.append(
            f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 42}" text-anchor="middle">bits per weight, all stored bytes counted</text>'
        )
        parts.append(
            f'<text x="16" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 16 {middle:.0f})">'
            "KL from the original, nats per token, mean over the texts</text>"
        )
        return parts


def _ticks(bottom: float, top: float) -> list[tuple[float, bool]]:
    """Return 1 to 9 of every power of ten between two logarithms, and whether each gets a label."""
    values = [d * 10.0**e for e in range(math.floor(bottom), math.ceil(top) + 1) for d in range(1, 10)]
    values = [v for v in values if bottom <= math.log10(v) <= top]
    kept = (1, 2, 5) if top - bottom < 2.5 else (1,) if top - bottom > 5 else (1, 3)
    return [(v, round(v / 10.0 ** math.floor(math.log10(v) + 1e-9)) in kept) for v in values]


def _kind(row: Row) -> str:
    return "peer" if row.get("kind") == "peer" else "recipe"


def _front_line(axes: _Axes, rows: Sequence[Row], color: str) -> list[str]:
    path = " ".join(
        f"{'M' if i == 0 else 'L'}{axes.x(row['bits_per_weight']):.1f} {axes.y(row['kl_mean']):.1f}"
        for i, row in enumerate(rows)
    )
    if len(rows) < 2:
        return []
    return [f'<path d="{path}" stroke="{color}" stroke-width="7" stroke-linejoin="round" fill="none" opacity="0.6"/>']


def _series(axes: _Axes, rows: Sequence[Row], color: str, mark: str, opacity: float) -> list[str]:
    """Draw one recipe at all its bits: a thin line, whiskers for the 95 % intervals, and marks with their figures as titles."""
    rows = sorted(rows, key=lambda row: row["bits_per_weight"])
    places = [(axes.x(row["bits_per_weight"]), axes.y(row["kl_mean"])) for row in rows]
    parts = []
    if len(rows) > 1 and opacity > 0:
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="{path}" stroke="{color}" stroke-width="0.8" fill="none" opacity="{opacity}"/>')
    for row, (x, y) in zip(rows, places, strict=True):
        width = row.get("kl_ci95")
        if width is not None and 0 < width < row["kl_mean"]:
            high, low = axes.y(row["kl_mean"] + width), axes.y(row["kl_mean"] - width)
            parts.append(f'<path d="M{x:.1f} {high:.1f}V{low:.1f}" stroke="{color}" stroke-width="0.8"/>')
        parts.append(_mark(x, y, mark, color, _told(row)))
    return parts


def _told(row: Row) -> str:
    width = "" if row.get("kl_ci95") is None else f" ± {row['kl_ci95']:.4g}"
    at = "" if row["bits"] is None else f" at {row['bits']}"
    return f"{row['name']}{at}: {row['bits_per_weight']:.3f} bits, KL {row['kl_mean']:.4g}{width}"


def _mark(x: float, y: float, mark: str, color: str, told: str = "") -> str:
    r = 4.5
    shapes = {
        "circle": f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        "square": "M-4 -4H4V4H-4Z",
        "up": "M0 -5.2L5 4H-5Z",
        "down": "M0 5.2L5 -4H-5Z",
        "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",
        "plus": "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
        "cross": "M-5 -2.6L-2.6 -5L0 -2.4L2.6 -5L5 -2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0Z",
        "star": "M0 -6L1.5 -2L5.8 -1.9L2.4 0.8L3.6 4.9L0 2.5L-3.6 4.9L-2.4 0.8L-5.8 -1.9L-1.5 -2Z",
    }
    title = f"<title>{escape(told)}</title>" if told else ""
    return (
        f'<path transform="translate({x:.1f} {y:.1f})" d="{shapes[mark]}" fill="{color}" stroke="white" stroke-width="0.6">'
        f"{title}</path>"
    )


def _labels(axes: _Axes, rows: Sequence[Row], looks: Mapping[str, tuple[str, str]], legend: Box) -> list[str]:
    """Write names beside points where they cover nothing: the fronts first; a name without room is left to the legend."""
    best = [row for kind in FRONTS for row in front([row for row in rows if _kind(row) == kind])]
    places = [(axes.x(row["bits_per_weight"]), axes.y(row["kl_mean"])) for row in rows]
    taken: list[Box] = [legend, *((x - 5, y - 5, x + 5, y + 5) for x, y in places)]
    order = sorted(range(len(rows)), key=lambda i: (not any(rows[i] is row for row in best), rows[i]["kl_mean"]))
    parts = []
    for i in order:
        (x, y), name = places[i], _short(str(rows[i]["name"]), 30)
        chosen = any(rows[i] is row for row in best)
        width, height = (BOLD if chosen else LETTER) * len(name), 12.0
        spots = [
            spot
            for reach in (8, 15, 24)
            for spot in (
                (x + reach, y - height / 2),
                (x - reach - width, y - height / 2),
                (x + reach * 0.7, y - reach * 0.7 - height),
                (x + reach * 0.7, y + reach * 0.7),
                (x - reach * 0.7 - width, y + reach * 0.7),
                (x - reach * 0.7 - width, y - reach * 0.7 - height),
            )
        ]
        boxes = [(a, b, a + width, b + height) for a, b in spots]
        free = next((box for box in boxes if _is_free(box, taken, axes.height)), None)
        if free is None:
            continue
        taken.append(free)
        weight = ' font-weight="bold"' if chosen else ""
        color = looks[str(rows[i]["name"])][0]
        parts.append(
            f'<text x="{free[0]:.1f}" y="{free[3] - 2.5:.1f}" font-size="11" fill="{color}"{weight}>{escape(name)}</text>'
        )
    return parts


def _is_free(box: Box, taken: Sequence[Box], height: float) -> bool:
    inside = box[0] > LEFT and box[2] < LEFT + WIDTH and box[1] > TOP and box[3] < TOP + height
    return inside and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken)


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("kl_mean") is not None]


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"
