"""Planes: a weight is a sum of planes of small digits, with one scale per plane and block.

    w_hat = sum_k scale_k * digit_k          code = i_0 + n_0 (i_1 + n_1 (i_2 + ...)), digit k the i_k-th of the n_k below

    planes2 3 4   -1, 1 in every plane          2^n levels around zero
    dual2         0, 1, then 0, -1              0, a, -b and a - b: DB-LLM; with a = 2 b the levels of int2
    trits2        -1, 0, 1 in both planes       9 levels, codes 0 to 8: PTQTP

Source   Chen et al. 2024, "DB-LLM: Accurate Dual-Binarization for Efficient LLMs": two planes of 0 and 1, scales 2 s and -s to
         begin with; and Xiao et al. 2025, "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models": scales by
         ridge regression, every weight the best of nine pairs of trits, in turn. The code of neither is public: the first is taken
         from a summary, the second from reimplementations that follow its algorithm step by step.
Differs  one fit for all: from a few starts (greedy signs of the residual; place values, as in an integer, under four clippings),
         scales by least squares and digits by the nearest sum alternate, and each block takes its best scales. PTQTP starts both
         planes at the signs with scales of 1 and adapts its ridge to the condition number; DB-LLM trains its scales. Scales are
         never negative, without loss for planes whose digits have both signs.
Needs    nothing; importance weighs both steps.
Cost     one sort of the weights; n scales per block. Weights are assigned by sorted sums, so the nearest sum is exact.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.block_levels import Cells, SortedBlocks, level_of, nearest_unsorted
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["Planes"]

# Steps from every start, and from the best of the results.
FIRST_STEPS = 10
STEPS = 20
CLIPPINGS = (1.0, 0.75, 0.5, 0.3)
# Share of the mean diagonal of the normal equations: planes of equal digits share a scale instead of an infinite one.
RIDGE = 1e-6


@dataclass(frozen=True)
class Planes:
    name: str
    digits: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.digits) <= 4 or any(len(set(plane)) < 2 or len(plane) > 3 for plane in self.digits):
            raise FormatError(f"{self.name}: planes need 2 to 4 planes of 2 or 3 digits each.")

    @property
    def num_codes(self) -> int:
        return math.prod(len(plane) for plane in self.digits)

    @property
    def code_bits(self) -> int:
        return (self.num_codes - 1).bit_length()

    @property
    def span(self) -> int:
        return 1

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale", shape=(len(self.digits),)),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the scales of every block; a block of zeros gets zeros."""
        ready = SortedBlocks.of(blocks, importance)
        start, *others = self._starts(ready)
        best, smallest = self._alternate(ready, start, FIRST_STEPS)
        for other in others:
            found, error = self._alternate(ready, other, FIRST_STEPS)
            better = error < smallest
            best, smallest = torch.where(better, found, best), torch.where(better, error, smallest)
        return {"scale": self._alternate(ready, best, STEPS)[0][:, None]}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        return nearest_unsorted(values, self._sums(params["scale"]), self.code_bits)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        return level_of(codes, self._sums(params["scale"]))

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a code without digits."""
        if bool((codes >= self.num_codes).any()):
            raise FormatError(f"{self.name}: a code is {int(codes.max())}, but there are only {self.num_codes} sums.")

    def _sums(self, scale: Float[torch.Tensor, "*any planes"]) -> Float[torch.Tensor, "*any codes"]:
        # Added plane by plane, not by a matrix product: sums of equal digits must always be equal to the last bit.
        terms = scale[..., None, :] * _digits(self.digits, scale.device)
        total = terms[..., 0]
        for plane in range(1, len(self.digits)):
            total = total + terms[..., plane]
        return total

    def _starts(self, blocks: SortedBlocks) -> list[Float[torch.Tensor, "blocks planes"]]:
        rest, greedy = blocks.values, []
        for _ in self.digits:
            mean = (rest.abs() * blocks.weights).sum(-1, keepdim=True) / blocks.weights.sum(-1, keepdim=True)
            greedy.append(mean)
            rest = rest - torch.where(rest < 0, -mean, mean)
        place = [1.0]
        for plane in self.digits[:-1]:
            place.append(place[-1] * len(plane))
        largest = blocks.values[:, :1].abs().maximum(blocks.values[:, -1:].abs())
        starts = [torch.cat(greedy, dim=-1)]
        for values in [place, place[::-1]] if len(set(self.digits)) > 1 else [place]:
            unit = torch.tensor(values, device=largest.device)
            unit = unit / self._sums(unit).abs().max()
            starts += [largest * clipping * unit for clipping in CLIPPINGS]
        return starts

    def _alternate(
        self, blocks: SortedBlocks, scale: Float[torch.Tensor, "blocks planes"], steps: int
    ) -> tuple[Float[torch.Tensor, "blocks planes"], Float[torch.Tensor, "blocks 1"]]:
        """Improve digits and scales in turn; return the best scales and their squared error."""
        best, smallest = scale, torch.full_like(blocks.square[:, :1], math.inf)
        for _ in range(steps):
            rising, order = self._sums(scale).sort(dim=-1)
            cells = blocks.cells(rising)
            error = blocks.error(rising, cells)
            better = error < smallest
            best, smallest = torch.where(better, scale, best), torch.where(better, error, smallest)
            moved = self._least_squares(cells, order)
            if torch.equal(moved, scale):
                break
            scale = moved
        return best, smallest

    def _least_squares(self, cells: Cells, order: Int[torch.Tensor, "blocks codes"]) -> Float[torch.Tensor, "blocks planes"]:
        """Return the best scales for the digits of the nearest sums."""
        count, digits = len(self.digits), _digits(self.digits, order.device).double()
        products = (digits[:, :, None] * digits[:, None, :]).flatten(1)
        by_code = torch.zeros_like(cells.importance)
        normal = (by_code.scatter(-1, order, cells.importance) @ products).view(-1, count, count)
        right = by_code.scatter(-1, order, cells.moment) @ digits
        mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        ridge = torch.where(mean > 0, mean * RIDGE, 1.0) * torch.eye(count, dtype=torch.float64, device=mean.device)
        scale = torch.linalg.solve(normal + ridge, right).float()
        mirrored = torch.tensor([set(plane) == {-digit for digit in plane} for plane in self.digits], device=scale.device)
        return torch.where(mirrored, scale.abs(), scale.clamp(min=0.0))


@cache
def _digits(planes: tuple[tuple[int, ...], ...], device: torch.device) -> Float[torch.Tensor, "codes planes"]:
    """Return the digits of every code."""
    codes = [combination[::-1] for combination in itertools.product(*reversed(planes))]
    return torch.tensor(codes, dtype=torch.float32, device=device)
