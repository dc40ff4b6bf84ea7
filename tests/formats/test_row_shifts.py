"""Scales that differ by shifts inside a row, the second scale constraint of ZeroQuant-FP."""

import torch

from bitpress.formats import SCALES, Packed, parse_format


def test_scales_of_a_row_are_shifts_of_its_largest() -> None:
    store = SCALES["p2row"]
    scale = torch.tensor([[3.0, 1.5, 0.8, 0.37, 0.0], [0.7, 0.5, 0.7 * 2**-9, 1e-9, 0.3]])
    outer = store.outer(scale)
    # 3 / 0.8 = 3.75 is nearest to 4 and 3 / 0.37 = 8.1 to 8; 0.7 / 0.5 = 1.4 is below sqrt 2 and stays; 0.7 / 0.3 = 2.33 is nearest to 2.
    expected = torch.tensor([[3.0, 1.5, 0.75, 0.375, 0.0], [0.7, 0.7, 0.7 * 2**-9, 0.7 * 2**-14, 0.35]])
    rounded = store.round(scale, outer)
    assert torch.equal(rounded, expected)
    stored = store.pack(rounded, outer)
    assert stored["row"].tolist() == scale[:, 0].tolist()
    assert stored[""].shape == (2, 3)
    assert torch.equal(store.unpack(stored, 5), expected)


def test_every_ratio_is_within_half_a_shift() -> None:
    scale = torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) + 1e-3
    store = SCALES["p2row"]
    ratio = store.round(scale, store.outer(scale)) / scale
    assert ratio.max() <= 2**0.5 * (1 + 1e-6)
    assert ratio.min() >= 2**-0.5 * (1 - 1e-6)


def test_groups_of_a_row_need_only_shifts_to_share_a_scale() -> None:
    fmt = parse_format("e2m1-g16-p2row")
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    assert set(packed.tensors) == {"codes", "scale", "scale_row"}
    # Over the row's scale everything is an e2m1 number shifted: a mantissa of two bits, up to the rounding of 3 times the scale.
    numbers = packed.dequantize().double() / packed.tensors["scale_row"][:, None].double()
    mantissa = torch.frexp(numbers.abs())[0].float()
    assert set(mantissa.unique().tolist()) <= {0.0, 0.5, 0.75}
    # 4 bits a scale in the place of 16: half a byte each, 4 bytes a row.
    assert fmt.nbytes((4, 64)) == 4 * 32 + 4 * 2 + 4 * 4
