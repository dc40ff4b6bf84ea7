"""Mixed groups: a few groups of channels in 4 bits, the others in 2, the same in every row, so that memory stays aligned.

Source   Li et al. 2023, "Enabling Fast 2-bit LLM on GPUs: Memory Alignment and Asynchronous Dequantization", known here from
         the abstracts of two versions: 4 bits for the small share of groups with the largest range; later, the largest Hessian and range.
Differs  groups are chosen by what 4 bits save of their cost, where the paper takes the largest range; for all rows together and stored as
         columns, since a choice for each row would take a bit a weight to say; the columns in 4 bits are rounded first and their error is
         fed to the others, as in GPTQ; scales are stored as the format says. Sparse outliers in 16 bits are the correction `outliers`.
Needs    gram [in, in] float32.     Cost  as GPTQ.
Update   gain(g) = sum over rows and columns of the group of ((w - Q2(w))^2 - (w - Q4(w))^2) / U[j, j]^2;  the `share` of largest gain in 4 bits
Fails    as GPTQ; FormatError for a format without groups of columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Kept, Packed
from bitpress.formats.table import find_grid
from bitpress.quantizers.mechanisms.error_feedback import Columns, Feedback, check_feedback, prepare
from bitpress.quantizers.mechanisms.outliers import in_blocks
from bitpress.quantizers.mechanisms.storage import column_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["AlignedGroups"]


@dataclass(frozen=True)
class AlignedGroups(Quantizer):
    share: float = 0.1
    damp: float = 0.01
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    serves: ClassVar[tuple[str, ...]] = tuple(
        f"{grid}2-{block}*" for grid in ("int", "bipolar", "nf", "gauss", "kmeans", "gmm", "planes") for block in ("g", "[1-9]")
    )
    summary: ClassVar[str] = "a few groups of channels in 4 bits among those in 2, with error feedback"
    paper: ClassVar[str] = "P344"
    bits: ClassVar[tuple[float, float]] = (2, 3)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        check_feedback("activation", self.damp, self.damp_limit, self.lazy)
        if not 0 <= self.share <= 1:
            raise UsageError(f"share={self.share}: must be 0 to 1.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        cols = fmt.block.resolve(shape)[1]
        across = shape[1] // cols
        count = min(round(self.share * across) or 1, across - 1) if 0 < self.share < 1 else round(self.share * across)
        return column_bytes(twice_as_wide(fmt), fmt, count * cols, shape, parts)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("aligned_groups", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("aligned_groups")
        w = w.float()
        wide = twice_as_wide(fmt)
        first = prepare(gram, "activation", 1, self.damp, self.damp_limit)
        chosen = self.choose(w, first, fmt)
        # The chosen columns first, both parts by falling energy; the factor is in that order.
        order = torch.cat([first.order[chosen[first.order]], first.order[~chosen[first.order]]])
        feedback = prepare(gram[order][:, order], "natural", 1, self.damp, self.damp_limit)
        terms = self._round(w, first.importance, feedback.factor, order, chosen, (wide, fmt))
        figures = {"damp": feedback.damp or 0.0, "wide": float(chosen.float().mean())}
        return Outcome(CompressedWeight(terms), feedback.fallbacks, figures)

    def choose(self, w: Float[torch.Tensor, "out in"], feedback: Feedback, fmt: Format) -> Bool[torch.Tensor, " in"]:
        """Return a mask of the columns of the groups that get 4 bits."""
        cost, ratios = feedback.cost(), shrink_ratios("mse", self.steps, self.smallest)
        left = []
        for candidate in (fmt, twice_as_wide(fmt)):
            params = candidate.fit(w, cost, ratios)
            left.append(in_blocks((candidate.decode(candidate.encode(w, params), params) - w).square() * cost, fmt))
        gain = left[0] - left[1]
        across, cols = gain.shape[2], gain.shape[3]
        score = gain.sum((0, 1, 3))
        count = min(round(self.share * across) or 1, across - 1) if 0 < self.share < 1 else round(self.share * across)
        chosen = torch.zeros(across, dtype=torch.bool, device=score.device)
        chosen[score.topk(count).indices] = True
        return chosen.repeat_interleave(cols)

    def _round(
        self,
        w: torch.Tensor,
        importance: torch.Tensor,
        factor: torch.Tensor | None,
        order: torch.Tensor,
        chosen: Bool[torch.Tensor, " in"],
        formats: tuple[Format, Format],
    ) -> tuple[Packed | Kept, ...]:
        """Round the chosen columns in the first format and the others in the second, each part in its own order."""
        ratios = shrink_ratios("mse", self.steps, self.smallest)
        terms: list[Packed | Kept] = []
        open_, start = w, 0
        for fmt, mask in zip(formats, (chosen, ~chosen), strict=True):
            count = int(mask.sum())
            if not count:
                continue
            stop = start + count
            part = open_[:, mask].contiguous()
            columns = Columns(fmt, part, importance[mask], ratios, static=True)
            # The position of each column of the part among the part's columns.
            place = (mask.cumsum(0) - 1)[order[start:stop]]
            columns.round_(place, None if factor is None else factor[start:stop, start:stop].contiguous(), self.lazy)
            packed = Packed.pack(fmt, columns.codes, columns.params)
            terms.append(packed if count == len(mask) else Kept.place(packed, "columns", mask))
            if factor is not None and stop < len(order):
                # The error left by rounding a part is E U for its own triangle of U; E is fed to the other columns.
                left = (part - packed.dequantize())[:, place]
                errors = torch.linalg.solve_triangular(factor[start:stop, start:stop], left, upper=True, left=False)
                open_ = w.clone()
                open_[:, order[stop:]] -= errors @ factor[start:stop, stop:]
            start = stop
        return tuple(terms)


def twice_as_wide(fmt: Format) -> Format:
    """Return the format of 4 bits with the same kind of grid."""
    return Format(find_grid(fmt.grid.name.replace("2", "4"), fmt.variant), fmt.block, fmt.scale, fmt.layout)
