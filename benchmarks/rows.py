"""Rows: one JSON line a measurement, with what is needed to judge it."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from bitpress.library import code_paths

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def add_row(question: str, row: dict[str, Any]) -> dict[str, Any]:
    """Append a row to benchmarks/results/<question>.jsonl, with commit, date and machine."""
    full = {**machine(), "commit": _commit(), "date": datetime.date.today().isoformat(), **row}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{question}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(full, sort_keys=True) + "\n")
    return full


def read_rows(question: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{question}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def rewrite_section(path: Path, name: str, lines: list[str]) -> None:
    """Put lines between the two marks of a section of a document."""
    begin, end = f"<!-- {name}: written by make docs -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path}: the section {name} is not marked by {begin} and {end}.")
    path.write_text(before + "\n".join([begin, *lines, end]) + after, encoding="utf-8")


def machine() -> dict[str, Any]:
    name = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "device": name,
        "code_path": next(iter(code_paths()), None),
        "threads": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
