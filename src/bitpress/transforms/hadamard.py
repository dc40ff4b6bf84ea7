"""The random Hadamard basis: signs at random, then a Hadamard matrix, so that no weight and no input channel stands out.

Source   Tseng et al. 2024, "QuIP#", and Ashkboos et al. 2024, "QuaRot"; by blocks as in Egiazarian et al. 2025 (MR-GPTQ).
Differs  widths that are no power of two as in `formats.maps.rotations`; block="group" rotates inside each of the format's blocks. QuIP#
         rotates both sides, and balances the channels before (the transform `balance`).
Needs    nothing.                   Cost  1 bit a channel; O(core + log n) operations a channel and token.
Update   T_in = H diag(signs),  T_out = H diag(signs')
Fails    FormatError for a width whose odd part is above 1,024, and for a block that does not divide the width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.formats import Format, Hadamard
from bitpress.transforms.basis import Maps, generator_of
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["HadamardBasis"]


@dataclass(frozen=True)
class HadamardBasis:
    """`block` is the whole "row", the "group" of the format, or a number of channels; `outputs` rotates the outputs too."""

    block: int | Literal["row", "group"] = "row"
    outputs: bool = False
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"}), "layer output": frozenset({"online"})}
    summary: ClassVar[str] = "random Hadamard rotation of the inputs, and of the outputs where wanted"
    paper: ClassVar[str] = "P204"

    def __post_init__(self) -> None:
        if self.block not in ("row", "group") and (not isinstance(self.block, int) or self.block < 2):
            raise UsageError(f"block={self.block!r}: it is 'row', 'group' or a number of 2 or more channels.")
        generator_of(self.seed, "input", 1)

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        out_features, in_features = w.shape[0], w.shape[1]
        block = in_features if self.block == "row" else self.block
        if block == "group":
            block = fmt.block.resolve((out_features, in_features), fmt.grid.span)[1]
        assert isinstance(block, int)
        inputs = Hadamard.random(in_features, block, generator_of(self.seed, "input", in_features))
        if not self.outputs:
            return inputs, None
        outputs = Hadamard.random(out_features, out_features, generator_of(self.seed, "output", out_features))
        return inputs, outputs
