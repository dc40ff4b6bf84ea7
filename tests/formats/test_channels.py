"""Inputs whose channels are not rounded alike: what is computed, what is stored, and what is refused."""

from typing import Any

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import ActivationFormat, ChannelFormat, CompressedLayer, CompressedWeight, parse_format
from bitpress.formats.channels import build_input, expected_input
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels.reference import Reference

IN, OUT = 32, 8
ROW4, ROW8 = (ActivationFormat(parse_format(f"int{bits}-row-fp32")) for bits in (4, 8))
SHIFT = torch.linspace(-3, 3, IN)
COPIES = torch.ones(IN, dtype=torch.uint8).index_fill(0, torch.tensor([3, 20]), 5)
CLIP = torch.tensor([0.7, 0.9])
CASES = [
    ChannelFormat(ROW4, clip=CLIP),
    ChannelFormat(ROW4, ROW8, 8, SHIFT, COPIES, CLIP),
    ChannelFormat(ROW4, shift=SHIFT),
    ChannelFormat(ROW4, copies=COPIES),
    ChannelFormat(ROW4, ROW8, 8),
    ChannelFormat(ROW4, ROW8, 8, SHIFT, COPIES),
    ChannelFormat(
        ActivationFormat.static(parse_format("int8-tensor-zero"), parse_format("int8-tensor-zero").fit(SHIFT[None])),
        shift=SHIFT,
    ),
]


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0)) * 2 + SHIFT


@pytest.mark.parametrize("fmt", CASES, ids=lambda fmt: fmt.name)
def test_what_is_stored_is_the_whole_format(fmt: ChannelFormat) -> None:
    spec, x = fmt.spec(), inputs()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in fmt.tensors.items()} == expected_input(spec, IN)
    again = build_input(spec, fmt.tensors)
    again.check()
    assert torch.equal(again.round(x), fmt.round(x))
    weight = CompressedWeight((sparse(torch.ones(OUT, IN), torch.ones(OUT, IN, dtype=torch.bool)),))
    layer = CompressedLayer(weight, fmt)
    rebuilt = CompressedLayer.build(weight.spec(), layer.tensors(), layer.input_spec())
    assert torch.equal(Reference().matmul(x, rebuilt), Reference().matmul(x, layer))
    plain = CompressedLayer(weight, fmt.rest)
    assert not torch.equal(Reference().matmul(x, rebuilt), Reference().matmul(x, plain))


@pytest.mark.parametrize("fmt", CASES, ids=lambda fmt: fmt.name)
def test_before_rounding_it_is_the_identity(fmt: ChannelFormat) -> None:
    x = inputs().double()
    # The two divisions and sums are rounded to float64 once each.
    assert (fmt.leave(fmt.enter(x)) - x).abs().max() < 1e-14


def test_a_shift_rounds_distances() -> None:
    x = inputs()
    expected = SHIFT + ROW4.round(x - SHIFT)
    assert torch.equal(ChannelFormat(ROW4, shift=SHIFT).round(x), expected)
    half = x.bfloat16()
    assert torch.equal(ChannelFormat(ROW4, shift=SHIFT).round(half), (SHIFT + ROW4.round(half.float() - SHIFT)).bfloat16())


def test_copies_are_channels_of_their_own_with_the_same_column() -> None:
    x, w = inputs(), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    times = COPIES.long()
    wide = (x / COPIES).repeat_interleave(times, -1)
    apart = ROW4.round(wide) @ w.repeat_interleave(times, -1).T
    torch.testing.assert_close(
        ChannelFormat(ROW4, copies=COPIES).round(x) @ w.T, apart, rtol=0, atol=1e-5 * float(apart.abs().max())
    )


def test_first_channels_have_scales_of_their_own() -> None:
    x = inputs()
    expected = torch.cat([ROW8.round(x[..., :8]), ROW4.round(x[..., 8:])], -1)
    assert torch.equal(ChannelFormat(ROW4, ROW8, 8).round(x), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shift": "float16"}, "shift is 'float16'"),
        ({"copies": 1}, "copies is 1"),
        ({"first": "8"}, "a number of channels and their format"),
        ({"first": "0 int8-row-fp32"}, "a number of channels and their format"),
        ({"first": 8}, "a number of channels and their format"),
        ({"first": "8 int8-tensor"}, "tokens would share dynamic parameters"),
        ({"other": "x"}, "format and parameters"),
        ({"parameters": "static", "format": "int8-tensor", "first": "8 int8-row"}, "need dynamic parameters"),
    ],
)
def test_a_specification_that_is_wrong_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        expected_input({**ROW4.spec(), **change}, IN)


def test_what_does_not_fit_or_is_damaged_is_refused() -> None:
    weight = CompressedWeight((sparse(torch.ones(OUT, IN), torch.ones(OUT, IN, dtype=torch.bool)),))
    with pytest.raises(FormatError, match="40 leading channels"):
        CompressedLayer(weight, ChannelFormat(ROW4, ROW8, 40))
    with pytest.raises(FormatError, match="not a multiple"):
        CompressedLayer(weight, ChannelFormat(ActivationFormat(parse_format("int4-g16-fp32")), ROW8, 8))
    with pytest.raises(FormatError, match="NaN or an infinity"):
        ChannelFormat(ROW4, shift=torch.full((IN,), torch.nan)).check()
    with pytest.raises(FormatError, match="copies hold a 0"):
        ChannelFormat(ROW4, copies=torch.zeros(IN, dtype=torch.uint8)).check()
    with pytest.raises(FormatError, match="no format for them"):
        ChannelFormat(ROW4, None, 3)
    layer = CompressedLayer(weight, ChannelFormat(ROW4, shift=SHIFT))
    with pytest.raises(FormatError, match="tensors are"):
        CompressedLayer.build(weight.spec(), {**layer.tensors(), "input.shift": SHIFT[:5]}, layer.input_spec())


def test_a_clip_takes_the_ends_of_every_block_in() -> None:
    """Each token's, or each group's, values above 0.7 times its largest and below 0.9 times its smallest are these ends."""
    x = inputs()
    for name, width in (("int4-row-fp32", IN), ("int4-g8-zero", 8)):
        rest = ActivationFormat(parse_format(name))
        apart = x.reshape(-1, IN // width, width)
        high, low = 0.7 * apart.amax(-1, keepdim=True).clamp(min=0), 0.9 * apart.amin(-1, keepdim=True).clamp(max=0)
        expected = rest.round(apart.clamp(low, high).reshape(x.shape))
        assert torch.equal(ChannelFormat(rest, clip=CLIP).round(x), expected)
    static = ActivationFormat.static(parse_format("int8-tensor"), parse_format("int8-tensor").fit(x[0]))
    with pytest.raises(FormatError, match="clip goes with those"):
        ChannelFormat(static, clip=CLIP)
    for bad in (torch.tensor([1.5, 0.5]), torch.tensor([0.0, 0.5]), torch.tensor([torch.nan, 0.5])):
        with pytest.raises(FormatError, match="clip is two factors"):
            ChannelFormat(ROW4, clip=bad).check()
