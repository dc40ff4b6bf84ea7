"""Weight equalization: divide a factor between two matrices in a row, so that their ranges are alike in every channel.

Source   Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", as the white paper (P178) and the study
         of minifloats (P006) use it; known here from summaries.
Differs  where the first matrix's rows make the channels of the second one's input, as found by trial (`folding`), values and output
         projection, up and down projection; a norm has no range, and what no matrix makes stays. One pass, from the first pair of a block
         to the last. Matrices that share the input count together. Biases count in no range. Factors are centred on 1.
Needs    the text, to see which weights share an input.      Cost  O(out * in).
Update   s = (r1 / r2)^(1/2);  w1 / s,  w2 * s;  r1: ranges of the rows of w1, r2: of the columns of w2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats import Format
from bitpress.transforms.folding import Fold
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import bounded, column_sizes, power
from bitpress.transforms.transform import InputStats

__all__ = ["Equalize", "row_sizes"]


@dataclass(frozen=True)
class Equalize:
    run_time: ClassVar[bool] = False  # without a matrix before, there is nothing to be alike

    needs: ClassVar[frozenset[str]] = frozenset(
        {"max_abs"}
    )  # of no use but that the text goes through, which shows who shares an input
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded"})}
    summary: ClassVar[str] = "make the ranges of two matrices in a row alike, channel by channel"
    paper: ClassVar[str] = "P178"

    def plan(
        self,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        stats: InputStats,
        fmt: Format,
        channel_of: Int[torch.Tensor, " in"] | None = None,
        inputs: Format | None = None,
        producer: Float[torch.Tensor, " in"] | None = None,
    ) -> Float[torch.Tensor, " in"]:
        """Choose the factor of every input channel; see `ScaleSearch`."""
        columns = column_sizes(weights, channel_of, "equalize")
        return torch.ones_like(columns) if producer is None else power(bounded(producer.float()), bounded(columns), 0.5)


def row_sizes(block: torch.nn.Module, fold: Fold) -> Float[torch.Tensor, " in"] | None:
    """Return the largest magnitude of the matrix row that makes every input channel; None where a norm makes them."""
    if fold.kind != "rows":
        return None
    weight = block.get_submodule(fold.producer).get_parameter("weight").detach().float()
    sizes = (weight if fold.out_first else weight.T)[fold.rows[0] : fold.rows[1]].abs().amax(1)
    return sizes[fold.channel_of.to(sizes.device)]
