"""Write the table of docs/rotation.md: what the transform `rotate` can rotate of every causal language model of transformers, or why not.

`python scripts/list_rotations.py` looks at all of them, tiny and without weights; with names, at those alone, and prints their rows.
"""

import runpy
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from sections import rewrite_sections

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "rotation.md"
LAW = runpy.run_path(str(ROOT / "tests" / "laws" / "architectures.py"))
WORKS = "yes"


def main(names: list[str]) -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    rows: dict[str, tuple[str, str]] = {}
    for name in names or taken():
        rows[name] = look_at(name)
        print(row(name, *rows[name]), flush=True)
    if not names:
        text = TARGET.read_text(encoding="utf-8")
        TARGET.write_text(rewrite_sections(TARGET.name, text, {"rotations": table(rows)}), encoding="utf-8")


def taken() -> list[str]:
    """Return the architectures that bitpress takes, by the document of them."""
    script = runpy.run_path(str(Path(__file__).with_name("list_architectures.py")))
    rows = script["rows_of"]((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    return [name for name, outcome in rows if outcome == "works"]


def look_at(name: str) -> tuple[str, str]:
    """Return what is said of the residual stream and of the value heads of an architecture."""
    from bitpress.models.rotating import find_turns

    _, residual, heads = find_turns(LAW["small_config"](name).to_dict(), name)
    residual_said = residual.rstrip(".") if isinstance(residual, str) else WORKS
    return residual_said, heads if isinstance(heads, str) else WORKS


def table(rows: Mapping[str, tuple[str, str]]) -> Iterable[str]:
    streams = sum(residual == WORKS for residual, _ in rows.values())
    heads = sum(values == WORKS for _, values in rows.values())
    yield f"Of {len(rows)} architectures, {streams} can be rotated in their residual stream and {heads} in their value heads.\n"
    yield "| model_type | residual stream | value heads |"
    yield "|---|---|---|"
    yield from (row(name, *said) for name, said in rows.items())


def row(name: str, residual: str, values: str) -> str:
    return f"| `{name}` | {residual.replace('|', '/')} | {values.replace('|', '/')} |"


if __name__ == "__main__":
    main(sys.argv[1:])
