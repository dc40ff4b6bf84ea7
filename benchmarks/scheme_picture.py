"""The picture of measured schemes: a line for each recipe or package, and on a logarithmic axis its KL on a model and on that with outliers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Shown", "draw_schemes"]

LEFT, WIDTH, TOP, LINE = 330, 520, 66, 17
OURS, PEER, FAINT, INK = "#1f5fa8", "#b35a00", "#dddddd", "#222222"


@dataclass(frozen=True)
class Shown:
    """One line: `plain` and `outliers` are distances in nats a token, None where there is no row."""

    scheme: str
    name: str
    is_peer: bool
    plain: float | None
    outliers: float | None


def draw_schemes(lines: Sequence[Shown], title: str) -> str:
    """Draw lines in the groups of their schemes, filled for the model, hollow for that with outliers; the best of each group first."""
    found = [kl for line in lines for kl in (line.plain, line.outliers) if kl]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    groups = list(dict.fromkeys(line.scheme for line in lines))
    height = TOP + LINE * (len(lines) + 2 * len(groups)) + 30

    def x(kl: float) -> float:
        return LEFT + WIDTH * (math.log10(kl) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" width="{LEFT + WIDTH + 40}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<circle cx="18" cy="40" r="4.5" fill="{OURS}"/><text x="28" y="44">SmolLM2-135M</text>',
        f'<circle cx="138" cy="40" r="4.5" fill="white" stroke="{OURS}" stroke-width="1.6"/>'
        '<text x="148" y="44">with planted outliers</text>',
        f'<rect x="286" y="36" width="8" height="8" fill="{PEER}"/><text x="300" y="44">another package</text>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{height - 24}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{10.0**power:g}</text>')
    y = TOP
    for group in groups:
        y += LINE
        parts.append(f'<text x="12" y="{y}" font-weight="bold">{escape(group)}</text>')
        own = [line for line in lines if line.scheme == group]
        for line in sorted(own, key=lambda one: max(one.plain or 0.0, one.outliers or 0.0)):
            y += LINE
            parts += _line(line, x, y)
        y += LINE
    return "\n".join([*parts, "</svg>", ""])


def _line(line: Shown, x: Callable[[float], float], y: int) -> list[str]:
    color = PEER if line.is_peer else OURS
    parts = [f'<text x="24" y="{y}">{escape(line.name)}</text>']
    if line.plain and line.outliers:
        a, b = sorted((x(line.plain), x(line.outliers)))
        parts.append(f'<line x1="{a:.1f}" y1="{y - 4}" x2="{b:.1f}" y2="{y - 4}" stroke="{color}" stroke-opacity="0.45"/>')
    for kl, fill in ((line.outliers, "white"), (line.plain, color)):
        if kl:
            mark = f'fill="{fill}" stroke="{color}" stroke-width="1.6"/>'
            if line.is_peer:
                parts.append(f'<rect x="{x(kl) - 4:.1f}" y="{y - 8}" width="8" height="8" {mark}')
            else:
                parts.append(f'<circle cx="{x(kl):.1f}" cy="{y - 4}" r="4.5" {mark}')
    return parts
