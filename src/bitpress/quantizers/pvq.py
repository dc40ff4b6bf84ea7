"""PVQ: pyramid vector quantization, directions and lengths chosen for the layer's output.

Source   van der Ouderaa et al. 2024, "Pyramid Vector Quantization for LLMs": groups of weights as a point of the pyramid and a
         quantized length, after a Hadamard rotation (the transform `hadamard`), with the Hessian instead of the plain error. Only its
         abstract and summaries were seen; the use of the Hessian is this file's own.
Differs  error feedback from group to group as in GPTQ; a direction starts at the nearest point, then pulses move between positions
         as long as the cost after feedback falls; all lengths of a row are solved for together at the end. Lengths are stored by the
         format's scale store (6 bits by default), not as quantiles of a beta distribution.
Needs    gram [in, in] float32.     Cost  as GPTQ, and moves * 2 * N^2 candidates for every N weights; O(out * in^2) for the lengths.
Update   cost(p) = min over s  |(w_k - s p) inv(U[k, k])|^2,  or at the s of a block that holds several directions
         lengths:  s = inv(V gram V') V gram w',  V [groups, in] the directions of a row
Fails    as GPTQ; FormatError for grids that are not pyramids. A row keeps its lengths unless the solution is better.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.formats.grids.pyramid import Pyramid
from bitpress.formats.layouts.dense import code_dtype
from bitpress.quantizers.mechanisms.error_feedback import Feedback, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.groups import metric_roots, walk
from bitpress.quantizers.mechanisms.row_scales import solve_scales
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["PVQ", "move_pulses"]


@dataclass(frozen=True)
class PVQ(Quantizer):
    moves: int = 4
    lengths: bool = True
    damp: float = 0.01
    order: Order = "activation"
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ("hadamard",)
    summary: ClassVar[str] = "pyramid directions and lengths with error feedback, after a random Hadamard rotation"
    paper: ClassVar[str] = "P425"
    bits: ClassVar[tuple[float, float]] = (1, 3)
    serves: ClassVar[tuple[str, ...]] = ("pvq*",)

    def __post_init__(self) -> None:
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.moves < 0:
            raise UsageError(f"moves={self.moves}: must be 0 or more.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("pvq", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("pvq")
        w = w.float()
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        codes, params = self._walk(w, feedback, fmt)
        if self.lengths and feedback.damp is not None and fmt.block.rows == 1:
            damped = gram + torch.diag(torch.where(feedback.dead, 1.0, self.damp) * feedback.importance.mean())
            params = solve_scales(w, codes, params, damped, fmt)
        weight = CompressedWeight((Packed.pack(fmt, codes, params),))
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0})

    def _walk(self, w: torch.Tensor, feedback: Feedback, fmt: Format) -> tuple[torch.Tensor, Params]:
        """Choose the directions in order; each error is fed to the directions after it."""
        grid, shape = fmt.grid, (w.shape[0], w.shape[1])
        assert isinstance(grid, Pyramid)
        own_length = fmt.block.resolve(shape, grid.span) == (1, grid.span)
        params = fmt.fit(w, feedback.importance)
        codes = torch.zeros(shape[1] // grid.span, shape[0], dtype=code_dtype(grid.code_bits), device=w.device)
        roots = metric_roots(feedback.factor, shape[1], grid.span, w.device)

        def choose(target: torch.Tensor, place: int, column: int) -> torch.Tensor:
            nonlocal params
            metric = roots[place] @ roots[place].T
            scale = None if own_length else fmt.columns(params, shape, column)["scale"]
            points = grid.points(grid.encode(target, {}).flatten())
            unit = grid.directions(move_pulses(target, points, metric, scale, self.moves))
            if own_length:
                params = fmt.refit(params, shape, column, unit * _length(target, unit, metric))
            code = grid.encode(unit, {})
            codes[column // grid.span] = code[:, 0]
            return grid.decode(code, fmt.columns(params, shape, column))

        walk(w, feedback.order, feedback.factor, grid.span, self.lazy, choose)
        return codes.T.contiguous(), params


def move_pulses(
    target: Float[torch.Tensor, "out n"],
    points: Int[torch.Tensor, "out n"],
    metric: Float[torch.Tensor, "n n"],
    scale: Float[torch.Tensor, "out 1"] | None,
    moves: int,
) -> Int[torch.Tensor, "out n"]:
    """Move up to `moves` pulses of every point, each time the best one, as long as the cost falls.

    The cost of a point's direction, scaled to the length `scale` (None: the best one), is measured by `metric`.
    """
    eye = torch.eye(len(metric), device=metric.device)
    pull = target @ metric
    p = points.float()
    for _ in range(moves):
        sign = p.sign()
        along, image, square = (p * pull).sum(1), p @ metric, p.square().sum(1)
        energy = (p * image).sum(1)
        best = _gain(along, energy, square, scale)
        chosen = torch.full_like(best, -1, dtype=torch.int64)
        # A pulse moves from position i to position j with either sign, unless j has the opposite sign.
        for k, put in enumerate((1.0, -1.0)):
            gains = _gain(
                _pairs(along, -sign * pull, put * pull),
                _pairs(energy, metric.diagonal() - 2 * sign * image, metric.diagonal() + 2 * put * image)
                - 2 * put * sign[:, :, None] * metric,
                _pairs(square, 1 - 2 * sign * p, 1 + 2 * put * p) - 2 * put * sign[:, :, None] * eye,
                None if scale is None else scale[:, :, None],
            )
            rest = p[:, None, :] - sign[:, :, None] * eye
            gains = gains.masked_fill((sign == 0)[:, :, None] | (rest * put < 0), -torch.inf).flatten(1)
            top, place = gains.max(1)
            # By more than rounding, so that no pulse oscillates.
            better = top > best + 1e-6 * best.abs()
            best, chosen = torch.where(better, top, best), torch.where(better, place * 2 + k, chosen)
        moved = (chosen >= 0).nonzero()[:, 0]
        if not len(moved):
            break
        pair, given = chosen[moved] // 2, 1.0 - 2.0 * (chosen[moved] % 2)
        i, j = pair // len(metric), pair % len(metric)
        p[moved, i] -= sign[moved, i]
        p[moved, j] += given
    return p.to(points.dtype)


def _pairs(whole: torch.Tensor, taken: torch.Tensor, given: torch.Tensor) -> Float[torch.Tensor, "out n n"]:
    """Return whole + taken_i + given_j."""
    return whole[:, None, None] + taken[:, :, None] + given[:, None, :]


def _gain(along: torch.Tensor, energy: torch.Tensor, square: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return by how much a direction reduces the cost of a zero weight, from target metric p', p metric p' and p p'."""
    if scale is None:
        return along.clamp(min=0).square() / energy
    length = scale.reshape(-1, *(1 for _ in along.shape[1:])) / square.sqrt()
    return 2 * length * along - length.square() * energy


def _length(target: torch.Tensor, unit: torch.Tensor, metric: torch.Tensor) -> Float[torch.Tensor, "out 1"]:
    """Return the lengths of least cost."""
    image = unit @ metric
    return ((target * image).sum(1, keepdim=True) / (unit * image).sum(1, keepdim=True)).clamp(min=0)
