"""Write the tables of methods into the marked sections of docs/methods.md, docs/activations.md and docs/tuning.md: `python scripts/list_methods.py`."""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sections import rewrite_sections

from bitpress.allocation.choices import CHOICES
from bitpress.calibration import STATISTICS
from bitpress.cli.listings import describe_methods
from bitpress.corrections.table import BIAS_CORRECTIONS, CORRECTIONS, OFFSET_CORRECTIONS
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import NAMED_RECIPES
from bitpress.transforms.table import TRANSFORMS
from bitpress.tuning.table import TUNINGS

# Those that leave codes and their parameters as they are.
NO_CODES = {"norm-tweaking"}
DOCS = Path(__file__).resolve().parents[1] / "docs"
TARGET = DOCS / "methods.md"
TABLES: dict[str, dict[str, type[Any]]] = {
    "quantizer": QUANTIZERS,
    "transform": dict(TRANSFORMS),
    "correction": {**CORRECTIONS, **BIAS_CORRECTIONS, **OFFSET_CORRECTIONS},
}


def main() -> None:
    for name in PAGES:
        page = DOCS / name
        page.write_text(rewrite(page.read_text(encoding="utf-8"), name), encoding="utf-8")


def rewrite(text: str, page: str = TARGET.name) -> str:
    """Return a document with every marked section written anew."""
    rows = describe_methods()
    return rewrite_sections(page, text, {name: make(rows) for name, make in PAGES[page].items()})


def _quantizers(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what it does | bits | formats | before it | needs | paper |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        if row["kind"] == "quantizer":
            serves = getattr(QUANTIZERS[row["name"]], "serves", ("*",))
            cells = (
                f"`{row['name']}`",
                row["summary"],
                "{:g} to {:g}".format(*row["bits"]) if row["bits"][0] < row["bits"][1] else f"{row['bits'][0]:g}",
                _patterns(serves),
                ", ".join(_before(part) for part in row["transforms"]) or "-",
                ", ".join(row["needs"]) or "-",
                row["paper"].removeprefix("yardstick: "),
            )
            yield _line(cells)


def _before(part: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}: {json.dumps(value)}" for key, value in part.items() if key != "name")
    return f"`{part['name']}`" + (f" with `{settings}`" if settings else "")


def _patterns(serves: tuple[str, ...]) -> str:
    if serves == ("*",):
        return "all"
    named = [pattern for pattern in serves if not pattern.startswith("!")]
    shown = "all" if named == ["*"] else ", ".join(f"`{pattern}`" for pattern in named[:4])
    shown = shown if len(named) <= 4 else f"{shown} and {len(named) - 4} more"
    exceptions = ", ".join(f"`{pattern[1:]}`" for pattern in serves if pattern.startswith("!"))
    return f"{shown} but {exceptions}" if exceptions else shown


def _transforms(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what it does | works on | needs | paper |"
    yield "|---|---|---|---|---|"
    on = {
        "network": "the whole network",
        "attention": "queries and keys of attention",
        "inputs": "how channels of inputs are rounded",
        "groups": "weights that share an input",
        "weights": "each weight alone",
        "targets": "what each weight's codes aim at",
    }
    for row in rows:
        if row["kind"] == "transform":
            yield _line((f"`{row['name']}`", row["summary"], on[row["works_on"]], ", ".join(row["needs"]) or "-", row["paper"]))


def _corrections(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what it does | needs | paper |"
    yield "|---|---|---|---|"
    for row in rows:
        if row["kind"] == "correction":
            yield _line((f"`{row['name']}`", row["summary"], ", ".join(row["needs"]) or "-", row["paper"]))


def _tunings(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what is learned | formats | loss | norms too | steps | paper |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        if row["kind"] == "tuning":
            settings, paper = row["settings"], row["paper"].removeprefix("yardstick: ")
            norms = "yes" if settings["norms"] else "no"
            codes = "none" if row["name"] in NO_CODES else _patterns(tuple(row["serves"]))
            yield _line(
                (f"`{row['name']}`", row["summary"], codes, f"`{settings['loss']}`", norms, str(settings["steps"]), paper)
            )


def _tuning_sources(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Yield what every way to learn says of its source, and its settings."""
    for row in rows:
        if row["kind"] == "tuning":
            yield from _source(row["name"], TUNINGS[row["name"]])


def _observers(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | which range | settings | source |"
    yield "|---|---|---|---|"
    for row in rows:
        if row["kind"] == "observer":
            settings = ", ".join(f"`{key}: {value}`" for key, value in row["settings"].items())
            yield _line((f"`{row['name']}`", row["summary"], settings or "-", row["paper"]))


def _choices(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | how a layer chooses | needs | settings | paper |"
    yield "|---|---|---|---|---|"
    for row in rows:
        if row["kind"] == "choice":
            settings = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in row["settings"].items())
            yield _line((f"`{row['name']}`", row["summary"], ", ".join(row["needs"]), settings or "-", row["paper"]))
    for name, choice in CHOICES.items():
        parts = _parts(inspect.getdoc(choice) or "")
        yield f"\n`{name}`: *Source.* {parts['Source']} *Differs.* {parts['Differs']}"


def _schemes(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what is stored and rounded | keys | stored so by |"
    yield "|---|---|---|---|"
    for row in rows:
        if row["kind"] == "scheme":
            keys = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in row["settings"].items())
            yield _line((f"`{row['name']}`", row["summary"], keys, row["paper"]))


def _named(_: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | what it does | keys | paper |"
    yield "|---|---|---|---|"
    for name, recipe in NAMED_RECIPES.items():
        keys = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in recipe.keys.items())
        yield _line((f"`{name}`", recipe.summary, keys, recipe.paper))
    for name, recipe in NAMED_RECIPES.items():
        yield f"\n`{name}`: *Source.* {recipe.source} *Differs.* {recipe.differs}"


def _statistics(_: list[dict[str, Any]]) -> Iterable[str]:
    yield "| name | shape | taken from |"
    yield "|---|---|---|"
    origins = {
        "input": "the layer's input",
        "original": "that and the same input in the uncompressed model",
        "attention": "what the block's attention does",
        "loss": "the gradient of the whole model's loss",
    }
    for name, statistic in STATISTICS.items():
        yield _line((f"`{name}`", f"`[{', '.join(statistic.shape)}]`", origins[statistic.origin]))


def _sources(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Yield every method's settings with their defaults, and what its file says of its source and of where it differs."""
    for row in rows:
        if row["kind"] not in TABLES:
            continue
        yield from _source(row["name"], TABLES[row["kind"]][row["name"]])


def _source(name: str, method: type[Any]) -> Iterable[str]:
    yield f"### `{name}`\n"
    own = inspect.getdoc(method) or ""
    parts = _parts(own if "\nSource " in own else str(sys.modules[method.__module__].__doc__))
    for part in ("Source", "Differs"):
        if part in parts:
            yield f"*{part}.* {parts[part]}\n"
    settings = [f"`{f.name}={_default(f)}`" for f in dataclasses.fields(method)]
    yield f"*Settings.* {', '.join(settings) or 'none'}.\n"


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else "..."


def _parts(text: str) -> dict[str, str]:
    """Take a docstring's paragraphs `Source ...`, `Differs ...` apart; lines that begin with spaces go on from the one before."""
    parts: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        begun = re.match(r"(Source|Differs|Needs|Cost|Update|Fails)\s+(.*)", line)
        if begun:
            current = begun[1]
            parts[current] = begun[2].strip()
        elif current and line.startswith(" "):
            parts[current] += " " + line.strip()
        else:
            current = ""
    return parts


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


SECTIONS: dict[str, Callable[[list[dict[str, Any]]], Iterable[str]]] = {
    "quantizers": _quantizers,
    "transforms": _transforms,
    "corrections": _corrections,
    "named recipes": _named,
    "statistics": _statistics,
    "sources": _sources,
}
PAGES = {
    TARGET.name: SECTIONS,
    "activations.md": {"choices": _choices, "schemes": _schemes, "observers": _observers},
    "tuning.md": {"tunings": _tunings, "tuning sources": _tuning_sources},
}

if __name__ == "__main__":
    main()
