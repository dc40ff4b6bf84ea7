"""Write what the native engine runs into the marked sections of docs/native.md: `python scripts/list_native.py`."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from sections import rewrite_sections

from bitpress.formats import GRIDS
from bitpress.formats.listing import usual_format
from bitpress.kernels.native_layout import has_layout
from bitpress.runtime.native.architectures import ARCHITECTURES

TARGET = Path(__file__).resolve().parents[1] / "docs" / "native.md"
WIDTH = 130


def main() -> None:
    TARGET.write_text(rewrite(TARGET.read_text(encoding="utf-8")), encoding="utf-8")


def rewrite(text: str) -> str:
    """Return the document with every marked section written anew."""
    laid_out = {name: has_layout(usual_format(row.grid, row.block)) for name, row in GRIDS.items()}
    sections = {
        "model types": _wrapped((f"`{name}`" for name in ARCHITECTURES), ", "),
        "grids with a native layout": _wrapped((name for name, fits in laid_out.items() if fits), " ", indent="    "),
    }
    return rewrite_sections(TARGET.name, text, sections)


def _wrapped(names: Iterable[str], between: str, indent: str = "") -> list[str]:
    filled = textwrap.wrap(between.join(names), WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
    return ["", *filled, ""]


if __name__ == "__main__":
    main()
