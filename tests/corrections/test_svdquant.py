"""SVDQuant takes the leading part of the weight out, and the codes hold the rest."""

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


def test_the_branch_is_the_leading_part_and_the_rest_is_rounded() -> None:
    w, fmt = with_strong_directions(), parse_format("int4-g16")
    weight = compress_matrix(
        w, None, LayerMethod(fmt, Named("quantizer", "", RTN()), corrections=tuple([SVDQuant(rank=3)]))
    ).weight
    codes, branch = weight.terms
    u, s, v = torch.linalg.svd(w)
    # As for LoRC: 2^-10 of every component for factors in fp16.
    assert (branch.dequantize() - (u[:, :3] * s[:3]) @ v[:3]).norm() < 2**-10 * float(s[:3].norm())
    assert torch.equal(codes.dequantize(), RTN().quantize(w - branch.dequantize(), None, fmt).weight.dequantize())
    assert SVDQuant().repair(w, weight, None) is None


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
