"""`bitpress report`: reports of published directories, as a page or as a table."""

from collections.abc import Sequence
from pathlib import Path

from bitpress.checkpoints.durable import write_durably
from bitpress.cli.screen import out, size, table
from bitpress.errors import UsageError
from bitpress.figures import shown
from bitpress.report.document import Report, read_report
from bitpress.report.page import write_comparison, write_page
from bitpress.report.sentences import say_kl, say_recipe

__all__ = ["read_reports", "show_comparison", "write_html"]

Reports = Sequence[tuple[str, Report]]


def read_reports(directories: Sequence[Path]) -> Reports:
    """Read the report of every directory, with the directory's name: its last part, or all of it where two share that.

    Raises CheckpointError, and UsageError for a directory that is named twice.
    """
    resolved = [directory.resolve() for directory in directories]
    lasts = [directory.name for directory in resolved]
    for directory, place in zip(directories, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f"{directory}: is named twice.")
    names = [place.name if lasts.count(place.name) == 1 else str(place) for place in resolved]
    return [(name, read_report(directory)) for name, directory in zip(names, directories, strict=True)]


def write_html(reports: Reports, target: Path) -> None:
    """Write the page of one report, or that of several. Raises UsageError for a file that cannot be written."""
    if not target.parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist.")
    if target.is_dir():
        raise UsageError(f"{target}: is a directory; name a file, such as {target / 'report.html'}.")
    text = write_page(reports[0][1], reports[0][0]) if len(reports) == 1 else write_comparison(reports)
    write_durably(target, [text.encode()])


def show_comparison(reports: Reports) -> None:
    """Print a line for every model, the smallest first."""
    rows = []
    for name, report in sorted(reports, key=lambda pair: pair[1].size.bytes):
        f = report.figures
        half = "" if f.kl_ci95 is None else f" ± {say_kl(f.kl_ci95, f.kl_mean)}"
        rows.append(
            (
                name,
                size(report.size.bytes),
                f"{f.bits_per_weight:.2f}",
                f"{say_kl(f.kl_mean, f.kl_mean)}{half}",
                "-" if f.top1_agreement is None else f"{100 * f.top1_agreement:.2f} %",
                shown(f.perplexity, "{:.3f}"),
                str(len(report.fallbacks)),
                say_recipe(report.job.recipe),
            )
        )
    columns = ("model", "size", "bits", "KL, nats a token", "same token", "perplexity", "fallbacks", "recipe")
    table("", columns, rows, right=(1, 2, 3, 4, 5, 6))
    out.print("[dim]--html FILE draws distance against size.[/dim]")
