"""Write which ecosystem holds which formats into the marked sections of docs/exchange.md: `python scripts/list_exchange.py`."""

from pathlib import Path

from sections import rewrite_sections

from bitpress.exchange.source import Target
from bitpress.exchange.table import EXPORTERS
from bitpress.exchange.tensor_parallel import RULES
from bitpress.formats import SHORT, parse_format
from bitpress.formats.listing import usual_formats

TARGET = Path(__file__).resolve().parents[1] / "docs" / "exchange.md"
# Every format here fits a weight of this shape.
SHAPE = (512, 2048)
# Families: their members are told as one where a target holds them all.
BLOCKS = ("g32", "g64", "g128", "row")
# Formats of other tools in blocks or with scales that are not the usual ones of their grid.
OF_OTHERS = (
    *("e2m1-g16-fp8over", "e4m3-row", "e4m3-tensor", "e4m3-128x128"),
    *(f"{grid}-g64-{store}" for grid in ("nf4", "fp4bnb") for store in ("fp32", "dq")),
)


def main() -> None:
    TARGET.write_text(rewrite(TARGET.read_text(encoding="utf-8")), encoding="utf-8")


def rewrite(text: str) -> str:
    """Return the document with every marked section written anew."""
    targets = {name: exporter.target for name, exporter in EXPORTERS.items() if exporter.target is not None}
    held = {name: [fmt for fmt in candidates() if holds(target, fmt)] for name, target in targets.items()}
    sections = {"matrix": matrix(held), "pairs": pairs(held), "tensor parallelism": rules()}
    return rewrite_sections(TARGET.name, text, sections)


def candidates() -> list[str]:
    """Return the names of the formats that are tried: those of the tables, of other tools, and integers in the usual groups."""
    named = [parse_format(name).name for name in SHORT.values()] + [fmt.name for fmt in usual_formats()]
    integers = [f"int{bits}-{block}{zero}" for bits in range(2, 9) for block in BLOCKS for zero in ("", "-zero")]
    return list(dict.fromkeys([*integers, *named, *OF_OTHERS]))


def holds(target: type[Target], fmt: str) -> bool:
    """Return whether a target stores a weight of a format bit for bit."""
    packed = {"kind": "packed", "format": fmt}
    return target.refuses({"shape": list(SHAPE), "terms": [packed], "input_map": None, "output_map": None}) is None


def matrix(held: dict[str, list[str]]) -> list[str]:
    """Return the table of sources and targets."""
    lines = ["", f"| from | {' | '.join(f'to `{name}`' for name in held)} |", f"|---|{'---|' * len(held)}"]
    for source, formats in held.items():
        cells = [_cell(formats, others) for others in held.values()]
        lines.append(f"| `{source}` | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(formats: list[str], others: list[str]) -> str:
    common = [name for name in formats if name in others]
    if len(common) == len(formats):
        return "all"
    return ", ".join(f"`{name}`" for name in families(common)) if common else "rounded"


def pairs(held: dict[str, list[str]]) -> list[str]:
    """Return the table of formats and the ecosystems that hold them."""
    holders = {fmt: tuple(name for name, formats in held.items() if fmt in formats) for fmt in candidates()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for fmt, names in holders.items():
        if names:
            groups.setdefault(names, []).append(fmt)
    rows = [
        f"| {', '.join(f'`{name}`' for name in families(formats))} | {', '.join(names)} |" for names, formats in groups.items()
    ]
    return ["", "| formats | stored code for code by |", "|---|---|", *rows, ""]


def rules() -> list[str]:
    """Return the table of what vLLM needs to divide a model among devices."""
    return [
        "",
        "| what must hold | where vLLM says so |",
        "|---|---|",
        *(f"| {r.about} | `{r.file}`, `{r.name}` |" for r in RULES),
        "",
    ]


def families(names: list[str]) -> list[str]:
    """Return names with those of all usual groups under one: int4-g32, int4-g64, int4-g128 and int4-row are int4-{g32,g64,g128,row}."""
    told: list[str] = []
    for name in names:
        grid, block, *rest = name.split("-")
        members = ["-".join([grid, other, *rest]) for other in BLOCKS]
        whole = block in BLOCKS and all(member in names for member in members)
        family = "-".join([grid, "{" + ",".join(BLOCKS) + "}", *rest]) if whole else name
        if family not in told:
            told.append(family)
    return told


if __name__ == "__main__":
    main()
