"""Runs and results on the screen: a progress bar with an ETA on a terminal, plain lines in a log, JSON for machines."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bitpress.figures import shown, written

__all__ = ["Screen", "begin_output", "duration", "has_printed_json", "print_json", "size", "table"]

err = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)
_state = {"printed": False}


class Screen:
    """Shows progress on standard error: a bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._what, self._total, self._done, self._already = "", 0, 0, 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._stop()
        self._what, self._total, self._done, self._already = what, total, done, done
        self._started = self._said = time.monotonic()
        if err.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=err)
            self._task = self._bar.add_task(what, total=total, completed=done, unit="")
            self._bar.start()
        else:
            err.print(f"{what}: {total - done} of {total} to do")

    def advance(self, unit: str, **figures: Any) -> None:
        self._done += 1
        memory = psutil.Process().memory_info().rss
        told = [f"{key} {value:.3g}" for key, value in figures.items()] + [f"memory {size(memory)}"]
        if self._bar is not None:
            self._bar.update(self._task, advance=1, unit=f"{unit}  {'  '.join(told)}")
        elif time.monotonic() - self._said > 5 or self._done == self._total:
            self._said = time.monotonic()
            elapsed = self._said - self._started
            left = elapsed / max(self._done - self._already, 1) * (self._total - self._done)
            err.print(f"{self._what}: {self._done}/{self._total} {unit}  {'  '.join(told)}  ETA {duration(left)}")

    def note(self, text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
    out.print(grid)


def size(count: float) -> str:
    """12_345_678 -> '12.3 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """95 -> '1:35'."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


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
