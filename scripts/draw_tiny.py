"""Draw the loss curves of the test models: `python scripts/draw_tiny.py` writes docs/tiny.png from benchmarks/results."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"bitpress-tiny": "tab:blue", "bitpress-tiny-moe": "tab:orange"}


def main() -> None:
    """Draw the loss of every model on training text as a line, and on held-out text as dots."""
    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    for name, colour in COLOURS.items():
        path = ROOT / "benchmarks" / "results" / f"{name}-loss.csv"
        rows = list(csv.DictReader(path.open(encoding="utf-8")))
        judged = [row for row in rows if row["heldout_loss"]]
        millions = [int(row["tokens"]) / 1e6 for row in rows]
        axes.plot(millions, [float(row["loss"]) for row in rows], color=colour, label=f"{name}, training text")
        dots = [int(row["tokens"]) / 1e6 for row in judged], [float(row["heldout_loss"]) for row in judged]
        axes.plot(*dots, "o", color=colour, markersize=3.5, label=f"{name}, held-out text")
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", title="Training of the test models")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "tiny.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
