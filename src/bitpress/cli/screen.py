"""Results on standard output: tables for people, JSON for machines. Progress is in `bitpress.screen`."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bitpress.figures import shown, written
from bitpress.screen import Screen, duration, err, size

__all__ = [
    "Screen",
    "begin_output",
    "duration",
    "err",
    "figures_table",
    "has_printed_json",
    "out",
    "print_json",
    "size",
    "table",
]

# A pipe or a file has no width: only a terminal breaks lines.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 2**14)
_state = {"printed": False}


def print_json(value: Any) -> None:
    """Print JSON on standard output, which then holds nothing else. Raises NumericsError for a figure that is no number."""
    text = json.dumps(written(value, "the result"), indent=1, ensure_ascii=False, allow_nan=False)
    _state["printed"] = True
    sys.stdout.write(text + "\n")


def has_printed_json() -> bool:
    """Say whether the command has printed its JSON already, so that no error may follow on standard output."""
    return _state["printed"]


def begin_output() -> None:
    """Reset the record of printed JSON, for another command in the same process."""
    _state["printed"] = False


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table on standard output; columns in `right` are aligned to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    grid.show_header = any(columns)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    if out.is_terminal:
        out.print(grid)
        return
    with out.capture() as capture:
        out.print(grid)
    for line in capture.get().splitlines():
        out.print(line.rstrip(), markup=False)


# Figures that have lines of their own, whatever the task.
_OWN_LINES = ("bits_per_weight", "bytes", "length", "seed")


def figures_table(figures: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Print the figures of an evaluation, and other rows below them. Raises NumericsError for a figure that is no number."""
    figures = written(figures, "the result")

    def pair(mean: str, width: str, factor: float, form: str) -> str:
        half = figures.get(width)
        return shown(figures[mean] * factor, form) + ("" if half is None else " ± " + form.format(half * factor))

    lines = []
    if "perplexity" not in figures:  # a task with figures of its own
        numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float)) and key not in _OWN_LINES}
        lines += [(key.replace("_", " "), shown(value, "{:.6g}")) for key, value in numbers.items()]
    elif "kl_mean" in figures:
        lines += [
            ("KL divergence from the original", pair("kl_mean", "kl_ci95", 1, "{:.4f}") + " nats a token"),
            ("same most likely token", pair("top1_agreement", "top1_ci95", 100, "{:.2f}") + " %"),
            (
                "perplexity",
                f"{shown(figures['perplexity'], '{:.3f}')} (original {shown(figures['perplexity_original'], '{:.3f}')})",
            ),
            ("measured on", f"{figures['tokens']:,} tokens of {figures['text']} in {figures['windows']} windows"),
            ("scored", f"{shown(figures['tokens_per_second'], '{:.0f}')} tokens/s"),
            *_runtime_rows(figures.get("runtime")),
        ]
    else:
        low, high = figures["perplexity_low"], figures["perplexity_high"]
        between = "" if low is None or high is None else f" (95 %: {shown(low, '{:.3f}')} to {shown(high, '{:.3f}')})"
        lines += [
            ("perplexity", f"{shown(figures['perplexity'], '{:.3f}')}{between}"),
            ("measured on", f"{figures['tokens']:,} tokens of {figures['text']} in {figures['windows']} windows"),
            ("scored", f"{shown(figures['tokens_per_second'], '{:.0f}')} tokens/s"),
        ]
    if figures.get("bits_per_weight") is not None:
        lines += [("bits per compressed weight", f"{figures['bits_per_weight']:.4f}"), ("size", size(figures["bytes"]))]
    lines += [(key, str(value)) for key, value in rows.items()]
    table("", ("", ""), [(a, b) for a, b in lines])


def _runtime_rows(runtime: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the lines about the runtime: its name, or its own distance beside that of the weights."""
    if runtime is None:
        return []
    settings = ", ".join(f"{key} {value}" for key, value in runtime["settings"].items())
    name = f"{runtime['name']} ({settings})" if settings else str(runtime["name"])
    if "unmeasured" in runtime:
        return [("runtime", f"{name}, not measured: {runtime['unmeasured']}")]
    if "kl_mean" not in runtime:
        return [("measured through", name)]
    agrees = f"{100 * runtime['top1_agreement']:.2f} % the same token"
    return [
        ("logits of the runtime", f"KL {shown(runtime['kl_mean'], '{:.4f}')}, {agrees}; {runtime['tokens']:,} tokens"),
        ("runtime", name),
    ]
