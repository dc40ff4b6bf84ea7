"""LNQ: levels learned for the layer's output: codes by coordinate descent, levels in closed form, in turn.

Source   Kim et al. 2025, "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance", whose layer-wise method for
         levels without a formula this is; the turns, their numbers and the ridge as in a copy of the authors' public code
         (`layerwise_quantize.py`).
Differs  it starts from levels by k-means weighted by the gram's diagonal and from codes by error feedback, where the code starts from
         SqueezeLLM's; the gram is that of the inputs, without the weights of the end loss; every row keeps its best state, where the code
         stops at the first round that does not help the whole weight. For words of several
         weights (`vq*`), `aqlm` does the same with a search by each word's own metric, which ends nearer.
Needs    gram [in, in] float32.     Cost  (1 + rounds * sweeps) passes of GPTQ, and out * in^2 * levels for every round.
Update   levels of a row:  c = inv(P gram P' + ridge I) P gram w',   P [levels, in] which weights have which level
         codes:  w_hat[:, j] = the level nearest to  w_hat[:, j] + (w - w_hat) gram[:, j] / gram[j, j]
Fails    as GPTQ; FormatError for formats without learned levels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.quantizers.mechanisms.coordinate_descent import LAZY, Descent, prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["LNQ", "solve_levels"]

# Added to the diagonal of the levels' equations, a share of its mean: a level without weights stays where it was.
RIDGE = 1e-7
# Numbers in the systems of equations that are solved together.
TOGETHER = 1 << 24


@dataclass(frozen=True)
class LNQ(Quantizer):
    rounds: int = 3
    sweeps: int = 4
    damp: float = 0.01
    order: Order = "activation"
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "levels learned for the layer's output, codes by coordinate descent"
    paper: ClassVar[str] = "yardstick: LNQ"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("kmeans*",)

    def __post_init__(self) -> None:
        check_feedback(self.order, self.damp, self.damp_limit, LAZY)
        if self.rounds < 0 or self.sweeps < 1:
            raise UsageError(f"rounds must be 0 or more and sweeps 1 or more, got {self.rounds}, {self.sweeps}.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("lnq", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("lnq")
        w = w.float()
        feedback = prepare(gram, self.order, 1, self.damp, self.damp_limit)
        descent = prepare_descent(gram, feedback.order, 1, self.damp)
        params = fmt.fit(w, feedback.importance)
        columns = Columns(fmt, w, feedback.importance, (1.0,), static=True, params=params)
        columns.round_(feedback.order, feedback.factor, LAZY)
        best = _State.of(w, columns.codes, params, descent, fmt)
        first = float(best.error.sum())
        state = best
        for turn in range(self.rounds + 1):
            codes, params = solve_levels(w, state.codes, state.params, descent.gram, fmt)
            state = _State.of(w, codes, params, descent, fmt)
            best = best.or_better(state, fmt)
            if turn == self.rounds:
                break
            codes, w_hat = state.codes, fmt.decode(state.codes, params)
            for _ in range(self.sweeps):
                codes = descent.sweep(w, w_hat, fmt, params)
                w_hat = fmt.decode(codes, params)
            state = _State.of(w, codes, params, descent, fmt)
            best = best.or_better(state, fmt)
        weight = CompressedWeight((Packed.pack(fmt, best.codes, best.params),))
        gain = 1 - float(best.error.sum()) / first if first > 0 else 0.0
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0, "gain": gain})


@dataclass(frozen=True)
class _State:
    """Codes and parameters, and their error by rows of blocks."""

    codes: Int[torch.Tensor, "out codes"]
    params: Params
    error: Float[torch.Tensor, " down"]

    @classmethod
    def of(cls, w: torch.Tensor, codes: torch.Tensor, params: Params, descent: Descent, fmt: Format) -> "_State":
        down = fmt.block_grid((w.shape[0], w.shape[1]))[0]
        return cls(codes, params, descent.errors(fmt.decode(codes, params) - w).view(down, -1).sum(1))

    def or_better(self, other: "_State", fmt: Format) -> "_State":
        """Return the better of two states, for every row of blocks."""
        better = other.error < self.error
        rows = better.repeat_interleave(len(self.codes) // len(better))
        across = self.params["levels"].shape[1]
        params = fmt.choose(better[:, None].expand(-1, across), other.params, self.params)
        codes = torch.where(rows[:, None], other.codes, self.codes)
        return _State(codes, params, torch.where(better, other.error, self.error))


def solve_levels(
    w: Float[torch.Tensor, "out in"],
    codes: Int[torch.Tensor, "out in"],
    params: Params,
    gram: Float[torch.Tensor, "in in"],
    fmt: Format,
) -> tuple[Int[torch.Tensor, "out in"], Params]:
    """Return the levels of least output error for the codes, all blocks of a row together, and the codes of the sorted levels."""
    down, across, count = params["levels"].shape
    rows, cols = w.shape[0] // down, w.shape[1] // across
    size = across * count
    pulled = w @ gram
    solved = []
    for some in torch.arange(down, device=w.device).split(max(TOGETHER // (size * w.shape[1] * rows), 1)):
        here = (some[:, None] * rows + torch.arange(rows, device=w.device)).flatten()
        which = torch.nn.functional.one_hot(codes[here].long(), count).float()  # [rows, in, count]
        parts = which.view(len(here), across, cols, count)
        wanted = torch.einsum("rac,rack->rak", pulled[here].view(len(here), across, cols), parts)
        system = torch.empty(len(here), across, count, across, count, device=w.device)
        for a in range(across):
            # gram times the indicators of one block of every row, then summed over the levels of all blocks
            felt = torch.matmul(gram[:, a * cols : (a + 1) * cols], parts[:, a]).view(len(here), across, cols, count)
            system[:, :, :, a] = parts.mT @ felt
        system = system.view(len(some), rows, size, size).sum(1).double()
        wanted = wanted.reshape(len(some), rows, size).sum(1).double()
        old = params["levels"][some].reshape(len(some), size).double()
        ridge = RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
        system.diagonal(dim1=1, dim2=2).add_(ridge)
        found = torch.linalg.solve_ex(system, wanted + ridge * old)[0]
        solved.append(torch.where(torch.isfinite(found), found, old).float())
    levels = torch.cat(solved).view(down, across, count)
    # A level beyond the range of what is stored would be lost; no weight's level is that far from all weights.
    bound = 2 * w.abs().max()
    rising, order = levels.clamp(-bound, bound).sort(dim=-1, stable=True)
    rank = torch.argsort(order, dim=-1).repeat_interleave(rows, 0)  # [out, across, count]
    moved = rank.gather(2, codes.long().view(w.shape[0], across, cols)).view(codes.shape)
    return moved.to(codes.dtype), fmt.stored({**params, "levels": rising})
