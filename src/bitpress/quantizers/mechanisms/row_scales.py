"""The jointly best scales of a row: least squares of the layer's output for fixed codes.

s = inv(V gram V') V gram w'        V [blocks, in] the row's values before scaling, one block a row
"""

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import NumericsError
from bitpress.formats import Format, Params
from bitpress.formats.scale_store import shared_name

__all__ = ["solve_scales"]

# Numbers in the systems of equations that are solved together.
TOGETHER = 1 << 24
# Share of the mean diagonal that is added, so that a row's equations have a solution.
RIDGE = 1e-6


def solve_scales(
    w: Float[torch.Tensor, "out in"],
    codes: Int[torch.Tensor, "out codes"],
    params: Params,
    gram: Float[torch.Tensor, "in in"],
    fmt: Format,
) -> Params:
    """Return `params` with the best scales of every row whose error falls with the stored scales.

    For blocks of one row with a single scale. Parameters shared by scales do not change, and a negative scale becomes 0.
    """
    across = params["scale"].shape[1]
    cols = w.shape[1] // across
    unit = fmt.decode(codes, {**params, "scale": torch.ones_like(params["scale"])})
    gram = gram / gram.diagonal().mean()
    pulled = w @ gram
    solved = []
    for rows in torch.arange(len(w), device=w.device).split(max(TOGETHER // across**2, 1)):
        v = unit[rows]
        system = w.new_empty(len(rows), across, across)
        for a in range(across):
            here = slice(a * cols, (a + 1) * cols)
            system[:, a] = (v[:, here] @ gram[here]).mul_(v).view(len(rows), across, cols).sum(-1)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        wanted = (pulled[rows] * v).view(len(rows), across, cols).sum(-1)
        solved.append(torch.linalg.solve_ex(system, wanted)[0])
    scale = torch.cat(solved)
    scale = torch.where(torch.isfinite(scale).all(1, keepdim=True), scale.clamp(min=0), params["scale"])
    outer = {part: params[shared_name("scale", part)] for part in fmt.store.expected(1, 1) if part}
    try:
        trial = {**params, "scale": fmt.store.round(scale, outer)}
    except NumericsError:  # beyond the range of a scale
        return params
    before, after = (fmt.decode(codes, p).sub_(w) for p in (params, trial))
    better = ((after @ gram).mul_(after).sum(1) < (before @ gram).mul_(before).sum(1))[:, None]
    return fmt.choose(better.expand(-1, across), trial, params)
