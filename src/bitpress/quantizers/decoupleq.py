"""decoupleQ: alternate between codes (by error feedback) and scales and zero points (by least squares).

Source   Guo et al. 2024, "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and
         Floating Points", eq. 6-8 and 11-12, alg. 1-2; integer zero points, rows that keep their best state and the damping steps
         as in the authors' public code (`quant.py`, `moq_quant.py`).
Differs  only the first stage, one weight at a time, without training scales and norms on a block's output. Codes by the paper's
         second approximation (GPTQ's columns), then by `sweeps` of coordinate descent (`Descent`), which the paper lacks (sweeps=0
         for the paper's way). Its first approximation (projected gradients) is left out. Zero points are rounded as the
         format stores them, scales are positive and rounded as stored; scales are solved for again under these zero points. Without a stored
         zero point only scales are solved for.
Needs    gram [in, in] float32.     Cost  O(rounds * (sweeps + 2) * out * in^2 + in^3) time, O(in^2) memory.
Update   codes = argmin under (scale, offset), then  (scale, offset) = argmin of
         (codes * scale + offset - w) gram (codes * scale + offset - w)',  all groups of a row together;  zero = -offset / scale
Fails    as GPTQ. Systems are damped by 1e-6 of their diagonal; a row keeps its state if a step does not improve it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.quantizers.mechanisms.coordinate_descent import LAZY, Descent, prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.scales import stored_scales, stored_zeros
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["DecoupleQ", "solve_affine"]

RIDGE = 1e-6
# Numbers in the systems of the rows that are solved together: 128 megabytes.
TOGETHER = 1 << 24


@dataclass(frozen=True)
class DecoupleQ(Quantizer):
    rounds: int = 4
    sweeps: int = 2
    damp: float = 0.01
    order: Order = "activation"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "codes by error feedback and scales by least squares, in turn"
    paper: ClassVar[str] = "P336"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    serves: ClassVar[tuple[str, ...]] = ("int*", "!*-min*")

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, LAZY)
        if self.rounds < 1 or self.sweeps < 0:
            raise UsageError(f"rounds must be 1 or more and sweeps 0 or more, got {self.rounds}, {self.sweeps}.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("decoupleq", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("decoupleq")
        w = w.float()
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        descent = prepare_descent(gram, feedback.order, fmt.grid.span, self.damp)
        params = fmt.fit(w, feedback.importance, shrink_ratios(self.clip, self.steps, self.smallest))
        codes, first = None, 0.0
        for _ in range(self.rounds):
            columns = Columns(fmt, w, feedback.importance, (1.0,), static=True, params=params)
            columns.round_(feedback.order, feedback.factor, LAZY)
            found, errors = columns.codes, descent.errors(w - fmt.decode(columns.codes, params))
            if codes is None:
                codes, first = found, float(errors.sum())
            else:
                better = errors < descent.errors(w - fmt.decode(codes, params))
                codes = torch.where(better[:, None], found, codes)
            for _ in range(self.sweeps):
                codes = descent.sweep(w, fmt.decode(codes, params), fmt, params)
            params = solve_affine(w, codes, descent, fmt, params)
        assert codes is not None
        last = float(descent.errors(w - fmt.decode(codes, params)).sum())
        weight = CompressedWeight((Packed.pack(fmt, codes, params),))
        return Outcome(weight, feedback.fallbacks, {"gain": 1 - last / first if first > 0 else 0.0})


def solve_affine(
    w: Float[torch.Tensor, "out in"], codes: Int[torch.Tensor, "out in"], descent: Descent, fmt: Format, params: Params
) -> Params:
    """Return the parameters with the best scales, and the best zero points if stored, for the codes.

    All blocks of a row are solved for together. A row keeps its parameters unless the new ones, rounded as stored, are better.
    """
    ones = torch.ones_like(params["scale"])
    if "zero" in params:
        scale, offset = _solve(w, codes.float(), descent.gram, fmt, offsets=True)
        zero = stored_zeros(fmt, (-offset / scale).nan_to_num(0.0, 0.0, 0.0))
        params = _better(w, codes, descent, fmt, params, {"scale": scale, "zero": zero})
    scale, _ = _solve(w, fmt.decode(codes, {**params, "scale": ones}), descent.gram, fmt, offsets=False)
    return _better(w, codes, descent, fmt, params, {"scale": scale})


def _solve(
    w: Float[torch.Tensor, "out in"], levels: Float[torch.Tensor, "out in"], gram: torch.Tensor, fmt: Format, *, offsets: bool
) -> tuple[Float[torch.Tensor, "down across"], Float[torch.Tensor, "down offsets"]]:
    """Return the scales, and the offsets if `offsets`, with the least (levels * scale + offset - w) gram (levels * scale + offset - w)'."""
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    across = w.shape[1] // cols
    unknowns = across * (2 if offsets else 1)
    solved = []
    together = max(TOGETHER // unknowns**2, 1) * rows
    for start in range(0, w.shape[0], together):
        q, own = levels[start : start + together], w[start : start + together]
        directions = (q, q.new_ones(1, q.shape[1])) if offsets else (q,)
        pull = own @ gram
        # [down, unknowns, unknowns] and [down, unknowns]: every direction inside every block against every other.
        system = q.new_empty(len(q) // rows, unknowns, unknowns)
        for i, direction in enumerate(directions):
            for block in range(across):
                here = slice(block * cols, (block + 1) * cols)
                moved = direction[:, here] @ gram[here]
                parts = [(moved * other).expand(q.shape).reshape(-1, rows, across, cols).sum((1, 3)) for other in directions]
                system[:, i * across + block] = torch.cat(parts, 1)
        right = torch.cat([(pull * d).view(-1, rows, across, cols).sum((1, 3)) for d in directions], 1)
        system = system.double()
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal > 0, RIDGE * diagonal, 1.0)
        solved.append(torch.linalg.solve_ex(system, right.double()).result.float())
    found = torch.cat(solved)
    return found[:, :across], found[:, across:]


def _better(
    w: Float[torch.Tensor, "out in"],
    codes: Int[torch.Tensor, "out in"],
    descent: Descent,
    fmt: Format,
    params: Params,
    changes: dict[str, torch.Tensor],
) -> Params:
    """Return the parameters, changed in the rows of blocks whose stored error falls."""
    scale = stored_scales(fmt, params, changes["scale"])
    trial = {**params, **changes, "scale": scale}
    errors = [descent.errors(w - fmt.decode(codes, p)).view(len(scale), -1).sum(1) for p in (trial, params)]
    better = (errors[0] < errors[1])[:, None]
    return {**params, **{name: torch.where(better, trial[name], params[name]) for name in changes}}
