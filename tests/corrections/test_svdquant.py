"""SVDQuant takes the leading part of the weight out, and the codes hold the rest."""

import pytest
import torch

from bitpress.corrections.svdquant import SVDQuant
from bitpress.formats import parse_format
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named


def with_strong_directions() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 64, generator=generator)
    return noise + 3 * torch.randn(40, 3, generator=generator) @ torch.randn(3, 64, generator=generator)


def test_without_steps_the_branch_is_the_leading_part_and_the_rest_is_rounded() -> None:
    w, fmt = with_strong_directions(), parse_format("int4-g16")
    weight = compress_matrix(
        w, None, LayerMethod(fmt, Named("quantizer", "", RTN()), corrections=tuple([SVDQuant(rank=3, steps=0)]))
    ).weight
    codes, branch = weight.terms
    u, s, v = torch.linalg.svd(w)
    # As for LoRC: 2^-10 of every component for factors in fp16.
    assert (branch.dequantize() - (u[:, :3] * s[:3]) @ v[:3]).norm() < 2**-10 * float(s[:3].norm())
    assert torch.equal(codes.dequantize(), RTN().quantize(w - branch.dequantize(), None, fmt).weight.dequantize())
    assert SVDQuant().repair(w, weight, None) is None


@pytest.mark.parametrize("name", ["int3-g16-zero", "int4-row", "nf4-g32"])
def test_steps_follow_what_rounding_leaves_and_the_best_is_kept(name: str) -> None:
    w, fmt = with_strong_directions(), parse_format(name)

    def left(part: torch.Tensor) -> float:
        return float((w - part - RTN(clip="mse").quantize(w - part, None, fmt).weight.dequantize()).norm())

    errors = [left(SVDQuant(rank=6, steps=steps).split(w, None, fmt).dequantize()) for steps in (0, 1, 5, 40)]
    assert errors == sorted(errors, reverse=True)
    # Whole decompositions in the place of single steps, from the law's own text.
    part, exact = SVDQuant(rank=6, steps=0).split(w, None, fmt).dequantize(), []
    for _ in range(41):
        exact.append(left(part))
        rest = w - RTN(clip="mse").quantize(w - part, None, fmt).weight.dequantize()
        u, s, v = torch.linalg.svd(rest)
        part = (u[:, :6] * s[:6]) @ v[:6]
    assert min(exact) < 0.95 * exact[0]
    assert errors[-1] < 1.02 * min(exact)


def test_strong_directions_cost_the_codes_nothing() -> None:
    w, fmt = with_strong_directions(), parse_format("int3-g64")
    alone = (w - RTN().quantize(w, None, fmt).weight.dequantize()).norm()
    kept = (
        w
        - compress_matrix(
            w, None, LayerMethod(fmt, Named("quantizer", "", RTN()), corrections=tuple([SVDQuant(rank=3)]))
        ).weight.dequantize()
    ).norm()
    assert kept < 0.4 * alone
