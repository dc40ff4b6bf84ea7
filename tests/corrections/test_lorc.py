"""LoRC's term is the truncated singular value decomposition of what rounding left."""

import torch

from bitpress.corrections.lorc import LoRC
from bitpress.formats import parse_format
from bitpress.quantizers.rtn import RTN

FMT = parse_format("int3-g16")


def test_it_is_the_leading_part_of_the_error() -> None:
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    rounded = RTN().quantize(w, None, parse_format("int3-g16")).weight
    term = LoRC(rank=6).repair(w, rounded, None)
    error = w - rounded.dequantize()
    u, s, v = torch.linalg.svd(error)
    # Two factors in fp16, each entry off by 2^-11 of itself at most: 2^-10 of every component.
    assert (term.dequantize() - (u[:, :6] * s[:6]) @ v[:6]).norm() < 2**-10 * float(s[:6].norm())
    left = (error - term.dequantize()).norm()
    assert abs(float(left) - float(s[6:].norm())) < 2**-10 * float(s.norm())
    assert LoRC().split(w, None, FMT) is None


def test_more_rank_is_nearer_and_coarser_factors_are_further() -> None:
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    rounded = RTN().quantize(w, None, parse_format("int2-g16-zero")).weight

    def left(**settings: object) -> float:
        return float((w - rounded.dequantize() - LoRC(**settings).repair(w, rounded, None).dequantize()).norm())  # type: ignore[arg-type]

    errors = [left(rank=r) for r in (1, 4, 16, 40)]
    assert errors == sorted(errors, reverse=True)
    assert left(rank=16) < left(rank=16, dtype="int4-row") < float((w - rounded.dequantize()).norm())
