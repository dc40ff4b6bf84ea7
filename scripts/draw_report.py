"""Draw the terminal report of a published model as docs/report.svg: `python scripts/draw_report.py OUT`."""

import json
import sys
from pathlib import Path

from rich.console import Console

from bitpress.cli import reports, screen


def main() -> None:
    directory = Path(sys.argv[1])
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    console = Console(record=True, width=92, highlight=False)
    screen.out = reports.out = console
    console.print(f"[dim]$ bitpress quantize smollm2-135m {directory} --samples 64[/dim]")
    reports.show_report(report, directory)
    target = Path(__file__).resolve().parents[1] / "docs" / "report.svg"
    console.save_svg(str(target), title="bitpress")


if __name__ == "__main__":
    main()
