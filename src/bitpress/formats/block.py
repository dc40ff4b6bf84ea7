"""The block of weights that shares one set of parameters: some rows by some columns, or a whole axis."""

import re
from dataclasses import dataclass
from typing import Literal

from bitpress.errors import FormatError

__all__ = ["Block"]

# ASCII digits, no leading zero, at most ten of them: a name may come from a file.
_SIZES = re.compile(r"g([1-9][0-9]{0,9})|([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")

Extent = int | Literal["all"]


@dataclass(frozen=True)
class Block:
    """`g64` is (1, 64), `row` is (1, "all"), `tensor` is ("all", "all"), `16x64` is (16, 64)."""

    rows: Extent
    cols: Extent

    @classmethod
    def parse(cls, text: str) -> "Block | None":
        """Return the block of a name, or None if the text is not a block's name."""
        if text == "row":
            return cls(1, "all")
        if text == "tensor":
            return cls("all", "all")
        sizes = _SIZES.fullmatch(text)
        if sizes is None:
            return None
        group, rows, cols = sizes.groups()
        return cls(1, int(group)) if group else cls(int(rows), int(cols))

    @property
    def name(self) -> str:
        if self.cols == "all":
            return "row" if self.rows == 1 else "tensor"
        return f"g{self.cols}" if self.rows == 1 else f"{self.rows}x{self.cols}"

    def resolve(self, shape: tuple[int, int], span: int = 1) -> tuple[int, int]:
        """Return the block in rows and columns of a weight `[out, in]`.

        Raises FormatError, with blocks that would fit, when the block does not divide the weight.
        """
        out_features, in_features = shape
        rows = out_features if self.rows == "all" else self.rows
        cols = in_features if self.cols == "all" else self.cols
        if in_features % cols:
            raise FormatError(
                f"in_features={in_features} is not a multiple of {cols}; blocks that fit: {fitting(in_features, span)}."
            )
        if out_features % rows:
            raise FormatError(f"out_features={out_features} is not a multiple of {rows}; use a block of 1 row.")
        if cols % span:
            raise FormatError(f"a block of {cols} columns is not a multiple of the {span} weights of a code.")
        return rows, cols


def fitting(in_features: int, span: int = 1) -> str:
    """Return the names of the blocks that fit: groups of 16 to 256 columns that divide `in_features`, and the row."""
    sizes = [n for n in (256, 192, 128, 96, 64, 48, 32, 16) if in_features % n == 0 and n % span == 0]
    return ", ".join([f"g{n}" for n in sizes] + ["row"])
