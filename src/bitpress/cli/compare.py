"""A comparison on the screen: a table that fills while recipes are measured, and a page with the picture at the end."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bitpress.checkpoints.durable import write_durably
from bitpress.cli.accuracy import by_recipe, heading, percent
from bitpress.cli.screen import Screen, duration, err, out, table
from bitpress.comparison.tasks import width_of
from bitpress.errors import UsageError
from bitpress.figures import shown
from bitpress.report.compare_picture import draw_comparison, front

__all__ = ["Board", "comparison_lines", "ordered", "parse_texts", "parse_widths", "show_comparison", "write_page"]

Row = Mapping[str, Any]


def parse_widths(text: str) -> list[int]:
    """'4,3,2' -> [4, 3, 2]. Raises UsageError."""
    widths = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if any(not 1 <= w <= 16 for w in widths) or len(set(widths)) < len(widths):
        raise UsageError(f"--bits {text!r}: write whole numbers from 1 to 16, each once, such as 4,3,2.")
    return widths


def parse_texts(given: Sequence[str] | None, default: Mapping[str, str]) -> dict[str, str]:
    """['news=news.txt'] -> {'news': 'news.txt'}. Raises UsageError."""
    texts: dict[str, str] = {}
    for text in given or ():
        name, equals, source = text.partition("=")
        if not equals or not source or not name.replace("-", "").replace("_", "").isalnum() or name in texts:
            raise UsageError(f"--text {text!r}: write NAME=SOURCE with a short name of its own, such as news=news.txt.")
        texts[name] = source
    return texts or dict(default)


class Board:
    """Shows finished rows and the work in progress: one live table on a terminal, a line each in a log."""

    def __init__(self, total: int, texts: Sequence[str], tasks: Sequence[str] = ()) -> None:
        self.total, self.texts, self.tasks = total, texts, tasks
        self.rows, self.answers = list[Row](), list[Row]()
        self._plain = None if err.is_terminal else Screen()
        self._what, self._units, self._done, self._unit = "", 0, 0, ""
        self._live = Live(get_renderable=self._render, console=err, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Board":
        if self._plain is None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._plain is None:
            self._live.stop()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._units, self._done, self._unit = what, total, done, ""
        if self._plain is not None:
            self._plain.begin(what, total, done)

    def advance(self, unit: str, **figures: Any) -> None:
        self._done += 1
        self._unit = "  ".join([unit, *(f"{key} {value:.3g}" for key, value in figures.items())])
        if self._plain is not None:
            self._plain.advance(unit, **figures)

    def step(self, unit: str, share: float, **figures: Any) -> None:
        self._unit = "  ".join([unit, f"{share:.0%}", *(f"{key} {value:.3g}" for key, value in figures.items())])
        if self._plain is not None:
            self._plain.step(unit, share, **figures)

    def note(self, text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    def row(self, row: Row) -> None:
        if row.get("kind") == "tasks":
            self.answers.append(row)
            if self._plain is not None:
                err.print(told_answers(row), markup=False, soft_wrap=True)
            return
        self.rows.append(row)
        if self._plain is not None:
            err.print(f"[{len(self.rows)}/{self.total}] {told(row, self.texts)}", markup=False, soft_wrap=True)

    def _render(self) -> Group:
        room = max(err.height - 6, 3)
        grid = _grid(self.texts, self.tasks)
        answers = by_recipe(self.answers)
        for row in self.rows[-room:]:
            grid.add_row(*(escape(cell) for cell in _cells(row, self.texts, self.tasks, answers)))
        state = f"{len(self.rows)} of {self.total} recipes; {self._what}: {self._done}/{self._units} {self._unit}"
        return Group(grid, Text(state, style="dim", overflow="ellipsis", no_wrap=True))


def told(row: Row, texts: Sequence[str]) -> str:
    """Return a row as one line."""
    if row["failed"]:
        return f"{label(row)}: failed: {row['failed']}"
    distances = ", ".join(f"{name} {_distance(row['texts'][name])}" for name in texts)
    seconds = duration(row["seconds_pressing"] + row["seconds_measuring"])
    return f"{label(row)}: {row['bits_per_weight']:.3f} bits, KL {distances}; error {row['error']:.4g}, {seconds}"


def told_answers(row: Row) -> str:
    """Return a row of a task as one line."""
    who = "original" if row["name"] is None else label(row)
    if row["failed"]:
        return f"{who}, {row['task']}: failed: {row['failed']}"
    return f"{who}, {row['task']}: {percent(row, 'acc')} % of {row['documents']} right"


def label(row: Row) -> str:
    return str(row["name"]) if row["bits"] is None else f"{row['name']}, {row['bits']} bits"


def ordered(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sort rows into groups of equal widths, the best first and failed ones last; mark the front and the first row of each group."""
    best = front(rows)

    def group(row: Row) -> int:
        return 0 if row["failed"] else width_of(row)

    lines: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (-group(r), r.get("kl_mean", 0.0))):
        opens = bool(lines) and group(lines[-1]) != group(row)
        lines.append({**row, "label": label(row), "front": any(row is other for other in best), "opens": opens})
    return lines


def comparison_lines(
    rows: Sequence[Row], texts: Sequence[str], tasks: Sequence[str] = (), answers: Sequence[Row] = ()
) -> list[tuple[str, ...]]:
    """Return the lines of the table; rows on the front have a star."""
    lines = []
    answered = by_recipe(answers)
    for row in ordered(rows):
        name, *rest = _cells(row, texts, tasks, answered)
        lines.append((f"{name} *" if row["front"] else name, *rest))
    return lines


def columns(texts: Sequence[str], tasks: Sequence[str] = ()) -> list[str]:
    shown = [*(f"KL {name}" for name in texts), "same token", *map(heading, tasks)]
    return ["recipe", "bits", *shown, "error", "time", "peak MB", "fallbacks"]


def show_comparison(done: Mapping[str, Any], directory: Path) -> None:
    """Print the table, the texts it was measured on, every failure, and where the files are."""
    names, tasks = list(done["texts"]), list(done["tasks"])
    heads = columns(names, tasks)
    table("", heads, comparison_lines(done["rows"], names, tasks, done["answers"]), right=range(1, len(heads)))
    read = ", ".join(f"{text['tokens']:,} tokens of {name} ({text['source']})" for name, text in done["texts"].items())
    out.print(
        f"\n{done['model']}, in {done['compute']}; {read}.\nKL: nats a token, ± half the 95 % interval. same token, error: means over texts, "
        "over weights. bits: all stored bytes.\n*: no other recipe has as few bits and a KL as small.",
        markup=False,
    )
    floor = done["floor"]
    if floor is not None and floor["texts"]:
        out.print(f"Noise: the original in {done['compute']} is {floor['kl_mean']:.2g} nats a token away from itself in fp32.")
    original = by_recipe(done["answers"]).get((None, None), {})
    for task, documents in done["tasks"].items():
        told = f"; the original: {percent(original[task], 'acc')} %" if task in original else ""
        out.print(f"{task}: % of {documents} questions right, ± one standard error{told}.", markup=False)
    for row in done["rows"]:
        if row["failed"]:
            out.print(f"failed: {label(row)}: {row['failed']}", markup=False)
    for row in done["answers"]:
        if row["failed"]:
            out.print(told_answers(row), markup=False)
    out.print(
        f"{directory / 'compare.html'} has all of it with the picture, {directory / 'results.jsonl'} the rows.", markup=False
    )


def write_page(done: Mapping[str, Any], directory: Path) -> None:
    """Write compare.html and compare.svg."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    model = Path(done["model"]).name
    title = f"{model}: what recipes cost"
    picture = draw_comparison(done["rows"], title)
    template = files("bitpress.cli").joinpath("compare_page.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    fine = [row for row in done["rows"] if not row["failed"]]
    originals = {name: _perplexity(fine[0]["texts"][name]["perplexity_original"]) if fine else "?" for name in done["texts"]}
    floor = done["floor"] if done["floor"] and done["floor"]["texts"] else None
    page = environment.from_string(template).render(
        title=title,
        model=model,
        compute=done["compute"],
        texts=done["texts"],
        floor=floor,
        rows=ordered(done["rows"]),
        originals=originals,
        tasks=done["tasks"],
        answers=by_recipe(done["answers"]),
        heading=heading,
        percent=percent,
        perplexity=_perplexity,
        picture=Markup(picture),  # our own, every word in it escaped
    )
    write_durably(directory / "compare.svg", [picture.encode()])
    write_durably(directory / "compare.html", [page.encode()])


def _grid(texts: Sequence[str], tasks: Sequence[str]) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns(texts, tasks)):
        grid.add_column(column, justify="right" if i else "left", overflow="ellipsis", no_wrap=True)
    return grid


def _cells(
    row: Row, texts: Sequence[str], tasks: Sequence[str], answers: Mapping[tuple[Any, Any], Mapping[str, Row]]
) -> list[str]:
    if row["failed"]:
        return [label(row), "failed", *[""] * (len(columns(texts, tasks)) - 2)]
    own = answers.get((row["name"], row["bits"]), {})
    figures = [row["texts"][name] for name in texts]
    agreement = math.fsum(f["top1_agreement"] for f in figures) / len(figures)
    return [
        label(row),
        f"{row['bits_per_weight']:.3f}",
        *(_distance(f) for f in figures),
        f"{100 * agreement:.1f} %",
        *(percent(own[task], "acc") if task in own else "" for task in tasks),
        f"{row['error']:.4g}",
        duration(row["seconds_pressing"] + row["seconds_measuring"]),
        f"{row['peak_memory_bytes'] / 1e6:.0f}",
        str(row["fallbacks"]),
    ]


def _perplexity(value: float | str | None) -> str:
    """Return a perplexity as text; older rows have null for an infinite one."""
    return shown("inf" if value is None else value, "{:.2f}" if value is None or float(value) < 10000 else "{:.2e}")


def _distance(figures: Row) -> str:
    width = figures["kl_ci95"]
    return f"{figures['kl_mean']:.4f}" + ("" if width is None else f" ± {width:.4f}")
