"""Bipolar weights of 8 bits hold those of 4 and 2: exactly what rounding the 8-bit weight would give."""

import pytest
import torch

from bitpress.errors import FormatError, NumericsError
from bitpress.formats import LAYOUTS, SCALES, CompressedWeight, Packed, parse_format
from bitpress.formats.nested import narrow
from bitpress.formats.scale_runs import RunCodes


def wide(block: str, scale: str = "fp16", seed: int = 0, layout: str = "nested") -> Packed:
    fmt = parse_format("-".join(["bipolar8", block, *([scale] if scale != "fp16" else []), *([layout] if layout else [])]))
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed))
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


@pytest.mark.parametrize("bits", [4, 2])
def test_every_code_narrows_to_the_nearest_level(bits: int) -> None:
    codes = torch.arange(256).to(torch.uint8)[None]
    fmt, narrower = parse_format("bipolar8-row-nested"), parse_format(f"bipolar{bits}-row")
    one = torch.ones(1, 1)
    packed = Packed.pack(fmt, codes, {"scale": one})
    result = narrow(packed, bits)
    values = fmt.decode(codes, {"scale": one})
    scaled = {"scale": one * (1 << (8 - bits))}
    assert torch.equal(result.unpack_codes(), narrower.encode(values, scaled))
    assert torch.equal(result.dequantize(), narrower.decode(narrower.encode(values, scaled), scaled))
    # No value lies in the middle of two levels, so that nearest is never a matter of taste.
    assert (result.dequantize() - values).abs().max() == (1 << (8 - bits)) - 1


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("block", ["g16", "row", "tensor", "2x16"])
@pytest.mark.parametrize("scale", [name for name, store in SCALES.items() if not isinstance(store, RunCodes)])
def test_a_weight_narrows_as_if_rounded_anew(bits: int, block: str, scale: str) -> None:
    packed = wide(block, scale)
    result = narrow(packed, bits)
    params = {"scale": packed.unpack_params()["scale"] * (1 << (8 - bits))}
    narrower = parse_format(f"bipolar{bits}-{block}-fp32")
    w = packed.dequantize()
    assert torch.equal(result.dequantize(), narrower.decode(narrower.encode(w, params), params))
    rebuilt = CompressedWeight.build(CompressedWeight((result,)).spec(), CompressedWeight((result,)).tensors())
    assert torch.equal(rebuilt.dequantize(), result.dequantize())


def test_only_the_upper_planes_are_read() -> None:
    packed = wide("row")
    broken = dict(packed.tensors)
    broken["codes"] = packed.tensors["codes"].clone()
    broken["codes"][:, 24:] ^= 255
    damaged = Packed(packed.format, packed.shape, broken)
    assert torch.equal(narrow(damaged, 4).dequantize(), narrow(packed, 4).dequantize())
    broken["codes"][:, 12:] ^= 255
    assert torch.equal(narrow(damaged, 2).dequantize(), narrow(packed, 2).dequantize())
    assert not torch.equal(narrow(damaged, 4).dequantize(), narrow(packed, 4).dequantize())


def test_the_layout_is_two_planes_of_pairs_and_one_of_nibbles() -> None:
    packed = LAYOUTS["nested"].pack(torch.tensor([[0b11_01_1010, 0b00_10_0101]], dtype=torch.uint8), bits=8)
    assert [f"{byte:08b}" for byte in packed[0].tolist()] == ["00000011", "00001001", "01011010"]


def test_stacked_experts_narrow_each_by_its_own_scales() -> None:
    experts = [wide("tensor", "fp8", seed) for seed in (1, 2, 3)]
    whole = narrow(Packed.stack_rows(experts), 4)
    assert whole.parts == 3
    assert torch.equal(whole.dequantize(), torch.cat([narrow(e, 4).dequantize() for e in experts]))


def test_what_cannot_be_narrowed_is_refused() -> None:
    with pytest.raises(FormatError, match="bipolar8-row-nested"):
        narrow(wide("row", layout=""), 4)
    with pytest.raises(FormatError, match="4 or 2 bits, not to 3"):
        narrow(wide("row"), 3)
    large = parse_format("bipolar8-row-nested")
    w = torch.full((1, 8), 3e5)
    params = large.fit(w)
    with pytest.raises(NumericsError, match="store scales as fp32"):
        narrow(Packed.pack(large, large.encode(w, params), params), 2)
