"""HQQ: fit the levels of every block for a small weight error in a norm that is insensitive to outliers; no data.

Source   Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io); the loop and its
         settings as in the authors' public code (`optimize_weights_proximal_legacy`).
Differs  only in formats with zero points between codes (int4-g64-zerofp16) are they floats, as HQQ's are; zero points that are codes
         seldom move, so scales, which HQQ leaves as they begin, are solved for there too (`scales` says so for any format). The best
         parameters are kept block by block, by the minimised norm, where the original stops when the mean error of the whole weight
         grows. The range of a block includes 0. With the original's beta an error below 0.17 shrinks to nothing, so most weights get
         plain least squares.
Needs    nothing.                   Cost  O(rounds * out * in) time.
Update   rest = shrink(w - w_hat),  shrink(x) = sign(x) max(|x| - |x|^(norm - 1) / beta, 0);  beta *= growth
         zero = mean(codes - (w - rest) / scale);   with `scales` before it  scale = sum (w - rest) q / sum q^2,  q = codes - zero;
         sums over a block
Fails    NumericsError when a weight is not finite. The first parameters are those of min-max rounding: never worse in the norm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.quantizers.mechanisms.scales import stored_scales, stored_zeros
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["HQQ", "shrink"]


@dataclass(frozen=True)
class HQQ(Quantizer):
    """`scales` says whether scales are solved for; None: unless the format has zero points between codes."""

    rounds: int = 20
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    scales: bool | None = None

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "half-quadratic fit of scales and zero points to the weights; no data"
    paper: ClassVar[str] = "yardstick: HQQ"
    bits: ClassVar[tuple[float, float]] = (2, 8)
    serves: ClassVar[tuple[str, ...]] = ("int*", "!*-min*")

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.norm <= 1 or not self.beta > 0 or not self.growth >= 1:
            raise UsageError(
                "rounds must be 1 or more, 0 < norm <= 1, beta > 0 and growth >= 1, "
                f"got {self.rounds}, {self.norm}, {self.beta}, {self.growth}."
            )

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("hqq", self.serves, fmt)
        w = w.float()
        best = now = fmt.fit(w)
        error = self.errors(w, fmt, now)
        moved = torch.zeros_like(error, dtype=torch.bool)
        beta = self.beta
        for _ in range(self.rounds):
            now = self.step(w, fmt, now, beta)
            beta *= self.growth
            trial = self.errors(w, fmt, now)
            better = trial < error
            error = torch.where(better, trial, error)
            moved |= better
            best = fmt.choose(better, now, best)
        weight = CompressedWeight((Packed.pack(fmt, fmt.encode(w, best), best),))
        return Outcome(weight, figures={"moved": float(moved.float().mean())})

    def step(self, w: Float[torch.Tensor, "out in"], fmt: Format, params: Params, beta: float) -> Params:
        """Return the best parameters for the codes under `params`, with outliers discounted."""
        codes = fmt.encode(w, params)
        target = w - shrink(w - fmt.decode(codes, params), beta, self.norm)
        levels = fmt.decode(codes, {**params, "scale": torch.ones_like(params["scale"])})
        scale = params["scale"]
        if not fmt.variant.startswith("zerofp") if self.scales is None else self.scales:
            scale = stored_scales(fmt, params, block_sums(target * levels, fmt) / block_sums(levels.square(), fmt))
        params = {**params, "scale": scale}
        if "zero" not in params:
            return params
        down, across = scale.shape
        count = w.numel() // (down * across)
        mean = (block_sums(codes.float(), fmt) - block_sums(target, fmt) / torch.where(scale > 0, scale, 1.0)) / count
        return {**params, "zero": stored_zeros(fmt, mean)}

    def errors(self, w: Float[torch.Tensor, "out in"], fmt: Format, params: Params) -> Float[torch.Tensor, "down across"]:
        """Return every block's sum of |error|^norm."""
        return block_sums((w - fmt.decode(fmt.encode(w, params), params)).abs_().pow_(self.norm), fmt)


def shrink(x: torch.Tensor, beta: float, norm: float) -> torch.Tensor:
    """Return the (approximate) minimum over e of  |e|^norm + beta / 2 (e - x)^2  up to constants: large values reduced a little."""
    return x.sign() * (x.abs() - x.abs().pow(norm - 1) / beta).clamp_(min=0)


def block_sums(x: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "down across"]:
    rows, cols = fmt.block.resolve((x.shape[0], x.shape[1]), fmt.grid.span)
    return x.view(x.shape[0] // rows, rows, x.shape[1] // cols, cols).sum((1, 3))
