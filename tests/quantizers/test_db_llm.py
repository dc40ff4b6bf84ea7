"""DB-LLM: the paper's thresholds choose the planes, and scales that are free of each other beat a common step."""

import pytest
import torch

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import Packed, parse_format
from bitpress.quantizers.db_llm import DBLLM
from bitpress.quantizers.mechanisms.two_planes import pairs_of
from bitpress.quantizers.rtn import RTN


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))


def test_planes_are_those_of_the_thresholds() -> None:
    w = weight()
    packed = DBLLM().quantize(w, None, parse_format("dual2-g32")).weight.terms[0]
    assert isinstance(packed, Packed)
    codes, params = packed.unpack()
    first, second = params["scale"].repeat_interleave(32, 1).unbind(-1)
    add = (w > (first - second) / 2).float()
    take = (w - first * add < -second / 2).float()
    # Where a < b the second plane is asked first, of the weight mirrored.
    mirrored_take = (-w > (second - first) / 2).float()
    mirrored_add = (-w - second * mirrored_take < -first / 2).float()
    upright = first > second
    assert 0 < int(upright.sum()) < upright.numel()
    digits = pairs_of(packed.format)[codes.long()].movedim(-1, 0)
    assert torch.equal(digits[0], torch.where(upright, add, mirrored_add))
    assert torch.equal(digits[1], -torch.where(upright, take, mirrored_take))
    torch.testing.assert_close(packed.dequantize(), first * digits[0] + second * digits[1], rtol=0, atol=1e-6)


def test_scales_are_the_best_for_their_planes() -> None:
    w = weight(1)
    packed = DBLLM().quantize(w, None, parse_format("dual2-row-fp32")).weight.terms[0]
    assert isinstance(packed, Packed)
    codes, params = packed.unpack()
    digits = pairs_of(packed.format)[codes.long()].movedim(-1, 0)
    for i in range(12):
        best = torch.linalg.lstsq(digits[:, i].T.double(), w[i, :, None].double()).solution[:, 0]
        torch.testing.assert_close(params["scale"][i, 0], best.float(), rtol=2e-3, atol=1e-4)


def test_two_scales_are_nearer_than_one_step() -> None:
    w = weight(2)
    ours, one = (
        DBLLM().quantize(w, None, parse_format("dual2-g32")),
        RTN(clip="mse").quantize(w, None, parse_format("int2-g32")),
    )
    assert float((ours.weight.dequantize() - w).square().sum()) < 0.9 * float((one.weight.dequantize() - w).square().sum())


def test_a_weight_on_the_levels_comes_back() -> None:
    levels = torch.tensor([0.0, 1.5, -0.5, 1.0])
    w = levels[torch.randint(0, 4, (6, 32), generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(DBLLM().quantize(w, None, parse_format("dual2-row")).weight.dequantize(), w, rtol=0, atol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="starts"):
        DBLLM(starts=0)
    with pytest.raises(FormatError, match=r"db_llm serves dual2-\*, not trits2-row"):
        DBLLM().quantize(weight(), None, parse_format("trits2-row"))
    with pytest.raises(NumericsError, match="NaN"):
        DBLLM().quantize(weight() * torch.nan, None, parse_format("dual2-row"))
