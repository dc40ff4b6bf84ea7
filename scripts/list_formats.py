"""Write the tables of number formats into the marked sections of docs/formats.md: `python scripts/list_formats.py`."""

import importlib
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sections import rewrite_sections

from bitpress.formats import TERMS, table
from bitpress.formats.listing import describe_tables

TARGET = Path(__file__).resolve().parents[1] / "docs" / "formats.md"


def main() -> None:
    TARGET.write_text(rewrite(TARGET.read_text(encoding="utf-8")), encoding="utf-8")


def rewrite(text: str) -> str:
    """Return the document with every marked section written anew."""
    rows = describe_tables()
    sections = {name: make([row for row in rows if row["kind"] == name]) for name, make in SECTIONS.items()}
    return rewrite_sections(TARGET.name, text, sections)


def _grids(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| usual format | bits | codes | span | stored beside the codes | what it is |"
    yield "|---|---|---|---|---|---|"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = re.sub(r"\d+", "#", f"{row['usual']} {row['about']} {row['stored']} {row['span']}")
        groups.setdefault(key if _one_change(rows, key) else row["usual"], []).append(row)
    for members in groups.values():
        first, last = members[0], members[-1]
        bits = [f"{row['bits_per_weight']:.3f}".rstrip("0").rstrip(".") for row in (first, last)]
        cells = (
            _from_to(f"`{first['usual']}`", f"`{last['usual']}`"),
            _from_to(*bits),
            _from_to(str(first["levels"]), str(last["levels"])),
            _from_to(str(first["span"]), str(last["span"])),
            _merged(", ".join(first["stored"]), ", ".join(last["stored"])),
            _merged(first["about"], last["about"]),
        )
        yield f"| {' | '.join(cells)} |"


def _one_change(rows: list[dict[str, Any]], key: str) -> bool:
    """Say whether what is said of the members of a family, `int2` to `int8`, differs in one number alone."""
    said = [r["about"] for r in rows if key == re.sub(r"\d+", "#", f"{r['usual']} {r['about']} {r['stored']} {r['span']}")]
    changes = zip(re.findall(r"\d+", said[0]), re.findall(r"\d+", said[-1]), strict=True)
    return len({pair for pair in changes if pair[0] != pair[1]}) <= 1


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} ... {last}"


def _merged(first: str, last: str) -> str:
    parts = zip(re.split(r"((?:fp)?\d+)", first), re.split(r"((?:fp)?\d+)", last), strict=True)
    return "".join(a if a == b else f"{a} to {b}" for a, b in parts)


def _families(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| pattern | what it is |"
    yield "|---|---|"
    for row in rows:
        yield "| `{}` | {} |".format(str(row["name"]).replace("|", "\\|"), row["about"])


def _shorts(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | stands for | bits |"
    yield "|---|---|---|"
    for row in rows:
        yield f"| `{row['name']}` | `{row['format']}` | {row['bits_per_weight']:.3f} |"


def _meanings(_: list[dict[str, Any]]) -> Iterable[str]:
    makers = [getattr(thing, "__module__", "") for thing in vars(table).values()]
    modules = [name for name in dict.fromkeys(makers) if name.startswith("bitpress.formats.")]
    for name in modules:
        if name.rpartition(".")[2] not in NOT_OF_GRIDS:
            yield from _specification(name)


def _terms(_: list[dict[str, Any]]) -> Iterable[str]:
    for kind, term in TERMS.items():
        yield from _specification(term.__module__, f"`{kind}`")


def _specification(name: str, heading: str = "") -> Iterable[str]:
    """Yield what a file's docstring says of bytes and numbers: all but where it comes from and what it costs."""
    module = importlib.import_module(name)
    paragraphs = re.split(r"\n\s*\n", str(module.__doc__).strip())
    title, _, first = paragraphs[0].partition(": ")
    yield f"### {heading or title}\n\n{first[0].upper()}{first[1:]}\n"
    imported = False
    for paragraph in paragraphs[1:]:
        if re.match(r"(Source|Differs|Needs|Cost|Update|Fails)\s", paragraph):
            continue
        if ">>>" in paragraph and not imported:
            imported = True
            used = [thing for thing in module.__all__ if re.search(rf"\b{thing}\b", paragraph)]
            yield f"    >>> from {name} import {', '.join(used)}"
        if "   " in paragraph.strip() and not paragraph.startswith(" "):  # columns that Markdown would run together
            paragraph = textwrap.indent(paragraph, "    ")
        yield paragraph + "\n"


# What the table of grids imports that makes no grid.
NOT_OF_GRIDS = {"block", "double_quantized", "format", "grid", "layouts", "scales", "table"}

SECTIONS: dict[str, Callable[[list[dict[str, Any]]], Iterable[str]]] = {
    "grid": _grids,
    "family": _families,
    "short": _shorts,
    "meaning": _meanings,
    "term": _terms,
}

if __name__ == "__main__":
    main()
