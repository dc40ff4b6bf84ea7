"""The tables of number formats as rows for people and machines, and the usual format of every grid."""

import math

from bitpress.formats.block import Block
from bitpress.formats.format import Format
from bitpress.formats.grids.grid import Grid, StoredParam
from bitpress.formats.layouts.table import LAYOUTS
from bitpress.formats.lossless import LOSSLESS
from bitpress.formats.scales import SCALES
from bitpress.formats.table import GRIDS, PATTERNS, SHORT, VARIANTS, describe_formats, find_grid, parse_format

__all__ = ["describe_tables", "usual_format", "usual_formats"]

# A large linear layer of a model of some billion weights, for comparing formats without a model.
SHAPE = (4096, 4096)


def usual_format(grid: Grid, block: str = "") -> Format:
    """Return the usual format of a grid: the block of its table row or of its kind, and the tightest layout.

    tensor   if the whole weight shares every parameter
    row      if levels are learned or a code stands for several weights: tables and small blocks would cost more than codes
    g64      otherwise
    """
    if {p.scope for p in grid.params} == {"tensor"}:
        usual = "tensor"
    elif grid.span > 1 or any(p.kind == "value" and p.shape for p in grid.params):
        usual = "row"
    else:
        usual = "g64"
    fits = {name: at for name, at in LAYOUTS.items() if at.refuses(grid.code_bits, grid.num_codes) is None}
    layout = min(fits, key=lambda name: fits[name].row_bytes(SHAPE[1] // grid.span, grid.code_bits))
    parsed = Block.parse(block or usual)
    assert parsed is not None, block
    return Format(grid, parsed, grid.usual_scale or "e8m0", layout)


def usual_formats() -> list[Format]:
    """Return one format per grid of the table, another for each variant with a zero point or a minimum, and the named formats."""
    formats: dict[str, Format] = {}
    for name, row in GRIDS.items():
        fmt = parse_format(name) if name in SHORT else usual_format(row.grid, row.block)
        formats[fmt.name] = fmt
        for grid in row.variants.values():
            if grid != row.grid:
                other = usual_format(grid, row.block)
                formats[other.name] = other
    for name in SHORT.values():
        formats.setdefault(name, parse_format(name))
    return list(formats.values())


def describe_tables() -> list[dict[str, object]]:
    """Return all parts of format names; `kind` is grid, family, scale, layout, lossless or short."""
    rows: list[dict[str, object]] = []
    for entry in describe_formats():
        head = str(entry["name"]).split("-")[0]
        variant = next((part for part in str(entry["name"]).split("-") if part in VARIANTS), "")
        fmt = parse_format(head) if head in SHORT else usual_format(find_grid(head, variant), GRIDS[head].block)
        fits = [n for n, at in LAYOUTS.items() if at.refuses(fmt.grid.code_bits, fmt.grid.num_codes) is None]
        row = {"kind": "grid", **entry, "usual": fmt.name, "bits_per_weight": _bits(fmt), "layouts": fits}
        rows.append(row | {"stored": [_stored(p, fmt) for p in fmt.grid.params]})
    for pattern, about, _ in PATTERNS:
        rows.append({"kind": "family", "name": pattern.pattern, "about": about})
    for name, store in SCALES.items():
        parts = {f"scale_{part}" if part else "scale": str(dtype) for part, (dtype, _) in store.expected(1, 1).items()}
        own = store.expected(SHAPE[0], SHAPE[1] // 64)
        nbytes = sum(dtype.itemsize * math.prod(dims) for dtype, dims in own.values())
        rows.append(
            {
                "kind": "scale",
                "name": name,
                "about": _said_of(store),
                "tensors": {key: dtype.removeprefix("torch.") for key, dtype in parts.items()},
                "bits_per_scale": nbytes * 8 * 64 / math.prod(SHAPE),
                "rows_apart": not store.shared_by_rows(),
            }
        )
    for name, at in LAYOUTS.items():
        rows.append({"kind": "layout", "name": name, "about": _said_of(at)})
    for name, exact in LOSSLESS.items():
        rows.append({"kind": "lossless", "name": name, "about": exact.about, "bits_per_weight": exact.usual_bits})
    for name, full in SHORT.items():
        rows.append({"kind": "short", "name": name, "format": full, "bits_per_weight": _bits(parse_format(full))})
    return rows


def _stored(param: StoredParam, fmt: Format) -> str:
    """Return how a parameter is stored: `scale fp16`, `zero 4 bits`, `levels fp16 x 16`."""
    how = {
        "scale": fmt.scale,
        "value": param.value_name,
        "code": f"{param.bits} bit{'s' * (param.bits > 1)}",
    }[param.kind]
    many = f" x {math.prod(param.shape)}" if param.shape else ""
    return f"{param.name} {how}{many}" + (" in all" if param.scope == "tensor" else "")


def _bits(fmt: Format) -> float:
    return fmt.nbytes(SHAPE) * 8 / math.prod(SHAPE)


def _said_of(row: object) -> str:
    return (type(row).__doc__ or "").strip().splitlines()[0].partition(". ")[0].rstrip(".")
