"""What is kept apart is the largest share, and it is exact to half precision."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.corrections.outliers import Outliers
from bitpress.corrections.salient import Salient
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named

FMT = parse_format("int3-g16")


def test_the_largest_magnitudes_are_kept() -> None:
    w = torch.tensor([[0.5, -9.0, 1.0, 2.0], [3.0, 0.1, -4.0, 8.0]])
    assert Outliers(share=3 / 8).split(w, None, FMT).dequantize().tolist() == [[0, -9, 0, 0], [0, 0, -4, 8]]
    assert Outliers(share=0.01).split(w, None, FMT).count == 0


def test_the_weights_that_carry_most_of_the_output_are_kept() -> None:
    w = torch.tensor([[0.5, -9.0, 1.0, 2.0], [3.0, 0.1, -4.0, 8.0]])
    stats = Stats(10, torch.diag(torch.tensor([100.0, 1e-4, 25.0, 1.0])))
    # |w| times the root mean square: 5 0.09 5 2 / 30 0.001 20 8
    assert Salient(share=3 / 8).split(w, stats, FMT).dequantize().tolist() == [[0, 0, 0, 0], [3, 0, -4, 8]]
    assert torch.equal(
        Salient(share=3 / 8).split(w, None, FMT).dequantize(), Outliers(share=3 / 8).split(w, None, FMT).dequantize()
    )


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3])
def test_the_count_is_the_share(share: float) -> None:
    w = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    kept = Outliers(share=share).split(w, None, FMT)
    assert kept.count == round(share * 3200)
    mask = kept.dequantize() != 0
    assert w[mask].abs().min() >= w[~mask].abs().max()
    assert torch.equal(kept.dequantize()[mask], w[mask].half().float())


def test_blocks_without_their_outliers_are_finer() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    w[::4, 7] *= 20
    fmt = parse_format("int4-g32-zero")
    alone = RTN().quantize(w, None, fmt).weight.dequantize()
    ours = compress_matrix(
        w, None, LayerMethod(fmt, Named("quantizer", "", RTN()), corrections=tuple([Outliers(share=8 / w.numel())]))
    ).weight.dequantize()
    assert (w - ours)[::4, :32].norm() < 0.3 * (w - alone)[::4, :32].norm()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
@pytest.mark.parametrize("kind", [Outliers, Salient])
def test_a_share_is_a_share(kind: type[Outliers] | type[Salient], share: float) -> None:
    with pytest.raises(UsageError, match="above 0 and below 1"):
        kind(share=share)
