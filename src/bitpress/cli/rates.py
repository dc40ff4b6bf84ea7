"""Measured formats on the screen: one line a format, the better of its clippings, gaps to the bound on every source."""

from collections.abc import Mapping
from typing import Any

from bitpress.cli.screen import out, table
from bitpress.evaluation.rate import SOURCES, best_rows

__all__ = ["COLUMNS", "rate_lines", "show_rates"]

COLUMNS = ("format", "bits", "error", "minmax", "mse", "model", *SOURCES)


def rate_lines(measured: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the lines of the table under `COLUMNS`: error and dB on the model, then dB below the bound on every source."""
    snr = {(r["format"], r["clip"]): _decibel(r, "snr_db") for r in measured["rows"] if r["source"] == "model"}
    by_source = {source: best_rows(measured, source) for source in ("model", *SOURCES)}
    lines = []
    for name, row in by_source["model"].items():
        gaps = [_decibel(rows[name], "gap_db") if name in rows else "-" for rows in by_source.values()]
        clips = [snr.get((name, clip), "-") for clip in ("minmax", "mse")]
        lines.append((name, f"{row['bits_per_weight']:.3f}", f"{row['error']:.2e}", *clips, *gaps))
    return lines


def show_rates(measured: Mapping[str, Any]) -> None:
    """Print the table, the weights that were measured, and the formats that were refused."""
    table("", COLUMNS, rate_lines(measured), right=range(1, len(COLUMNS)))
    out.print(
        f"\n{measured['model']}: {measured['weights']:,} of {measured['weights_of_model']:,} weights in {measured['matrices']} matrices.\n"
        "bits: stored, a weight. error: squared, relative. minmax, mse: signal-to-noise ratio in dB with either clipping.\n"
        "model, gaussian, laplace, student5: dB below the Gaussian bound 2^(-2 bits), 6.02 a bit, with the better one."
    )
    for name, reason in measured["refused"].items():
        out.print(f"not everywhere: {name}: {reason}", markup=False)


def _decibel(row: Mapping[str, Any], key: str) -> str:
    return "exact" if row[key] is None else f"{row[key]:.2f}"
