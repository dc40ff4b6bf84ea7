"""bitpress against what other tools made of the same numbers: equal bit for bit, or the difference said here and asserted exactly.

The vectors are written by scripts/build_golden.py; none of those tools is needed to run this. Three kinds of comparison:

    levels      the number that every code stands for
    rounding    the code of every number of a sweep: levels, middles, their neighbors in float32, what overflows and underflows
    conversion  a tool's codes and scales as a `Packed`: decoded to the tool's own numbers

`same` compares bits, so -0.0 is not 0.0 and a last digit counts.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitpress.formats import CompressedWeight, Levels, Packed, parse_format
from bitpress.formats.double_quantized import dynamic_map
from bitpress.formats.layouts import dense as dense
from bitpress.formats.scales import SCALES
from bitpress.formats.table import find_grid

HERE = Path(__file__).parent
TOOLS = ("ml_dtypes", "gfloat", "torchao", "bitsandbytes", "compressed_tensors", "gguf")
ONE = {"scale": torch.ones(())}


@cache
def golden(tool: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / f"{tool}.safetensors")


def cases(tool: str, what: str) -> list[str]:
    return sorted(name.removesuffix(f"/{what}") for name in golden(tool) if name.endswith(f"/{what}"))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def levels(name: str) -> torch.Tensor:
    grid = find_grid(name)
    assert isinstance(grid, Levels)
    return torch.tensor(grid.levels)


def stored(fmt: str, codes: torch.Tensor, **params: torch.Tensor) -> Packed:
    """Return a tool's codes and parameters as a term that went through its bytes."""
    return Packed.pack(parse_format(fmt), codes, params)


@pytest.mark.parametrize("tool", TOOLS)
def test_vectors_say_where_they_come_from(tool: str) -> None:
    with safe_open(HERE / f"{tool}.safetensors", "pt") as f:
        about = json.loads(f.metadata()["about"])
    assert about["tool"] == tool
    assert set(about["versions"]) == {tool, "torch", "numpy"}
    assert about["command"] == f"python scripts/build_golden.py --tool {tool}"


# Minifloats. "i" of a name: with infinities, as in IEEE 754.
ML_DTYPES = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "float8_e3m4": "e3m4i",
    "float8_e4m3": "e4m3i",
    "float6_e2m3fn": "e2m3",
    "float6_e3m2fn": "e3m2",
    "float4_e2m1fn": "e2m1",
}
# Types with a zero of one sign, whose code 128 is the only NaN: of the grid that comes nearest, the codes given are no numbers.
FNUZ = {
    "float8_e4m3b11fnuz": ("e4m3b11", {127, 255}),
    "float8_e4m3fnuz": ("e4m3b8", {127, 255}),
    "float8_e5m2fnuz": ("e5m2b16", {124, 125, 126, 127, 252, 253, 254, 255}),
}


def assert_levels_equal(name: str, foreign: torch.Tensor) -> None:
    ours = levels(name)
    numbers = torch.isfinite(foreign)
    assert torch.equal(torch.isfinite(ours), numbers)
    assert same(ours[numbers], foreign[numbers])


@pytest.mark.parametrize("name", sorted(ML_DTYPES))
def test_levels_are_those_of_ml_dtypes(name: str) -> None:
    assert_levels_equal(ML_DTYPES[name], golden("ml_dtypes")[f"{name}/levels"])


@pytest.mark.parametrize("name", sorted(FNUZ))
def test_types_with_one_zero_differ_in_the_codes_that_are_named(name: str) -> None:
    ours, foreign = levels(FNUZ[name][0]), golden("ml_dtypes")[f"{name}/levels"]
    differ = set((ours.view(torch.int32) != foreign.view(torch.int32)).nonzero().flatten().tolist())
    assert differ == FNUZ[name][1] | {128}
    assert torch.isnan(ours[sorted(FNUZ[name][1])]).all()
    assert math.copysign(1.0, ours[128]) == -1.0
    assert torch.isnan(foreign[128])


@pytest.mark.parametrize("name", cases("gfloat", "levels"))
def test_levels_are_those_of_gfloat(name: str) -> None:
    assert_levels_equal(name, golden("gfloat")[f"{name}/levels"])


def test_gfloat_knows_every_minifloat_of_the_table() -> None:
    ours = {f"e{x}m{bits - 1 - x}" for bits in range(3, 9) for x in range(1, bits)}
    assert ours <= set(cases("gfloat", "levels"))


@pytest.mark.parametrize("name", sorted(ML_DTYPES))
def test_rounding_is_that_of_ml_dtypes_until_it_overflows(name: str) -> None:
    """Halves to even, negative zeros and denormals alike; what becomes an infinity or a NaN there is the largest number here."""
    vectors, ours = golden("ml_dtypes"), ML_DTYPES[name]
    inputs = vectors[f"{name}/inputs"]
    signed = torch.stack([inputs, -inputs])
    codes = find_grid(ours).encode(signed, ONE)
    foreign = vectors[f"{name}/codes"]
    finite = torch.isfinite(vectors[f"{name}/levels"][foreign.int()])
    assert torch.equal(codes[finite], foreign[finite])
    # The types without infinities and NaN saturate themselves.
    assert bool(finite.all()) == (name in ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"))
    top = levels(ours).nan_to_num(0).max()
    assert torch.equal(levels(ours)[codes.int()][~finite], (top * signed.sign())[~finite])
    assert (signed[~finite].abs() > top).all()


@pytest.mark.parametrize("name", cases("gfloat", "codes"))
def test_rounding_is_that_of_gfloat(name: str) -> None:
    inputs = golden("gfloat")[f"{name}/inputs"]
    codes = find_grid(name).encode(torch.stack([inputs, -inputs]), ONE)
    assert torch.equal(codes, golden("gfloat")[f"{name}/codes"])


@pytest.mark.parametrize("bits", [2, 4])
def test_integers_are_those_of_ml_dtypes(bits: int) -> None:
    """Two's complement there, counted from the smallest here: the highest bit is turned over. With a zero point of 0: unsigned."""
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    signed = find_grid(f"int{bits}").decode(codes ^ (1 << (bits - 1)), ONE)
    assert torch.equal(signed, golden("ml_dtypes")[f"int{bits}/levels"])
    unsigned = find_grid(f"int{bits}", "zero").decode(codes, {**ONE, "zero": torch.zeros(())})
    assert torch.equal(unsigned, golden("ml_dtypes")[f"uint{bits}/levels"])


def test_e8m0_scales_are_those_of_ml_dtypes() -> None:
    codes = torch.arange(255, dtype=torch.uint8)[None]
    assert same(SCALES["e8m0"].unpack({"": codes}, 255)[0], golden("ml_dtypes")["float8_e8m0fnu/levels"])


def test_e8m0_rounding_differs_between_the_two_middles() -> None:
    """ml_dtypes takes the nearer power by difference, and the upper one of 1.5; bitpress the nearer by ratio, from the root of 2."""
    inputs, foreign = golden("ml_dtypes")["float8_e8m0fnu/inputs"], golden("ml_dtypes")["float8_e8m0fnu/codes"]
    ours = SCALES["e8m0"].pack(inputs[None], {})[""][0]
    mantissa = torch.frexp(inputs)[0].double() * 2
    between = (mantissa > math.sqrt(2)) & (mantissa < 1.5)
    assert int(between.sum()) == 8 * 4
    assert torch.equal(ours.int() - foreign.int(), between.int())


# torchao: formats of blocks, from the weight to the number.
MX = ("mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e3m2", "mxfp4")


@pytest.mark.parametrize("name", MX)
def test_mx_is_that_of_torchao(name: str) -> None:
    """Scales, codes and numbers, and for mxfp4 the bytes too: torchao packs two codes a byte, the first one low, as `dense` does."""
    vectors, fmt = golden("torchao"), parse_format(name)
    w = vectors["mx/w"]
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    assert torch.equal(packed.tensors["scale"], vectors[f"{name}/scale"])
    foreign = vectors[f"{name}/codes"]
    assert torch.equal(packed.tensors["codes"] if name == "mxfp4" else packed.unpack_codes(), foreign)
    assert same(packed.dequantize(), vectors[f"{name}/decoded"])


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_dyadic"])
def test_nvfp4_of_torchao_decodes_to_its_numbers(name: str) -> None:
    vectors = golden("torchao")
    packed = Packed(
        parse_format("nvfp4"),
        (6, 64),
        {
            "codes": vectors[f"{name}/codes"],
            "scale": vectors[f"{name}/scale"],
            "scale_tensor": vectors[f"{name}/per_tensor"],
        },
    )
    packed.check()
    assert same(packed.dequantize(), vectors[f"{name}/decoded"])


def test_nvfp4_is_chosen_as_torchao_chooses_it() -> None:
    """Where (largest / 6) / 448 is largest / (6 * 448) also in float32; in general the two differ in the last digit."""
    vectors, fmt = golden("torchao"), parse_format("nvfp4")
    w = vectors["nvfp4_dyadic/w"]
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    assert same(packed.tensors["scale_tensor"], vectors["nvfp4_dyadic/per_tensor"])
    assert torch.equal(packed.tensors["scale"], vectors["nvfp4_dyadic/scale"])
    assert torch.equal(packed.tensors["codes"], vectors["nvfp4_dyadic/codes"])
    general = fmt.fit(vectors["nvfp4/w"])["scale_tensor"].reshape(1)
    torch.testing.assert_close(general, vectors["nvfp4/per_tensor"], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", [f"int{b}{z}" for b in range(2, 9) for z in ("", "-zero")])
def test_integers_are_chosen_as_torchao_chooses_them(name: str) -> None:
    """Its symmetric mapping without clipping, and its asymmetric one: scales, zero points, codes and numbers."""
    vectors = golden("torchao")
    bits, zero = int(name[3]), name.endswith("zero")
    fmt = parse_format(f"int{bits}-g32{'-zero' if zero else ''}-fp32")
    w = vectors["int/w"]
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    assert same(params["scale"], vectors[f"{name}/scale"])
    half = 1 << (bits - 1)
    assert torch.equal(codes.int() - (0 if zero else half), vectors[f"{name}/codes"].int())
    assert torch.equal(params["zero"].int() if zero else torch.zeros(4, 2, dtype=torch.int32), vectors[f"{name}/zero"])
    assert same(Packed.pack(fmt, codes, params).dequantize() + 0.0, vectors[f"{name}/decoded"] + 0.0)


@pytest.mark.parametrize("name", ["e2m1", "e2m2", "e3m1", "e2m3", "e3m2", "e4m1"])
def test_floats_of_a_row_are_chosen_as_torchao_chooses_them(name: str) -> None:
    vectors, fmt = golden("torchao"), parse_format(f"{name}-row-fp32")
    w = vectors["floatx/w"]
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    assert same(params["scale"].flatten(), vectors[f"{name}/scale"])
    assert torch.equal(codes, vectors[f"{name}/codes"])
    assert same(fmt.decode(codes, params), vectors[f"{name}/decoded"])


# bitsandbytes: the first of two codes is the high half of a byte there, the low half here.
def high_first(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)


BNB = {"nf4": "nf4", "fp4": "fp4bnb"}


@pytest.mark.parametrize("name", sorted(BNB))
def test_levels_are_those_of_bitsandbytes(name: str) -> None:
    assert torch.equal(levels(BNB[name]), golden("bitsandbytes")[f"{name}/levels"])


@pytest.mark.parametrize("name", sorted(BNB))
def test_four_bits_are_chosen_as_bitsandbytes_chooses_them(name: str) -> None:
    """fp4 has two zeros: bitpress gives a small number the one of its sign, bitsandbytes on a CPU the other."""
    vectors, fmt = golden("bitsandbytes"), parse_format(f"{BNB[name]}-g64-fp32")
    w = vectors["4bit/w"]
    params = fmt.fit(w)
    assert same(params["scale"].flatten(), vectors[f"{name}/absmax"])
    ours, foreign = fmt.encode(w, params), high_first(vectors[f"{name}/codes"])
    small = (ours & 7 == 0) & (w != 0) if name == "fp4" else torch.zeros_like(w, dtype=torch.bool)
    assert int(small.sum()) == {"nf4": 0, "fp4": 15}[name]
    assert torch.equal(foreign ^ small.to(torch.uint8) * 8, ours)
    assert torch.equal(stored(fmt.name, foreign, **params).dequantize(), vectors[f"{name}/decoded"])


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert same(dynamic_map(), golden("bitsandbytes")["dynamic/levels"])
    assert same(levels("dynamic8"), golden("bitsandbytes")["dynamic/levels"])


def test_a_block_of_the_dynamic_map_is_scaled_by_its_largest_magnitude() -> None:
    """As bitsandbytes scales it; the map ends at -0.99, so that a largest weight below 0 is not a level."""
    w = torch.tensor([[0.5, -2.0, 0.25, 0.0], [0.5, 2.0, 0.25, -0.003]])
    fmt = parse_format("dynamic8-row-fp32")
    params = fmt.fit(w)
    assert params["scale"].tolist() == [[2.0], [2.0]]
    decoded = fmt.decode(fmt.encode(w, params), params)
    expected = (w / 2).flatten()[:, None] - golden("bitsandbytes")["dynamic/levels"]
    nearest = golden("bitsandbytes")["dynamic/levels"][expected.abs().argmin(1)] * 2
    assert torch.equal(decoded.flatten(), nearest)


def test_nested_scales_are_those_of_bitsandbytes() -> None:
    """The offset is a mean, whose last digits depend on the order of summation: with bitsandbytes' own, everything is equal."""
    vectors, fmt = golden("bitsandbytes"), parse_format("nf4-g64-dq")
    absmax = vectors["nested/absmax"]
    stored_there = {"": vectors["nested/codes"][None], "block": vectors["nested/block"], "offset": vectors["nested/offset"]}
    assert same(fmt.store.unpack(stored_there, 300)[0], vectors["nested/decoded"])
    w = torch.zeros(1, 64 * 300)
    w[0, ::64] = absmax
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    torch.testing.assert_close(packed.tensors["scale_offset"], vectors["nested/offset"], rtol=2.0**-20, atol=0)
    # Half a unit of the offset moves every difference from it by as much; the codes are the same.
    torch.testing.assert_close(
        packed.tensors["scale_block"], vectors["nested/block"], rtol=0, atol=float(absmax.mean()) * 2.0**-20
    )
    assert torch.equal(packed.tensors["scale"][0], vectors["nested/codes"])
    torch.testing.assert_close(params["scale"][0], vectors["nested/decoded"], rtol=2.0**-19, atol=0)


# compressed-tensors: codes of any width side by side, least significant bit first, in words of 32 bits: the bytes of `dense`.
PACKED = [name.removesuffix("/packed") for name in sorted(golden("compressed_tensors")) if name.endswith("/packed")]
PACKED_INTEGERS = [name for name in PACKED if name.startswith("int")]


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", [n for n in PACKED_INTEGERS if not n.endswith("zero")])
def test_symmetric_integers_of_compressed_tensors(name: str) -> None:
    """Their symmetric scale is largest / (2^bits - 1) * 2, which may clip; codes under that scale, and the bytes, are equal."""
    vectors, fmt = golden("compressed_tensors"), parse_format(f"{name}-fp32")
    w = vectors["int/w"]
    params = {"scale": vectors[f"{name}/scale"]}
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    assert torch.equal(packed.tensors["codes"], as_bytes(vectors[f"{name}/packed"]))
    if f"{name}/decoded" in vectors:
        assert torch.equal(packed.dequantize(), vectors[f"{name}/decoded"])


@pytest.mark.parametrize("name", [n for n in PACKED_INTEGERS if n.endswith("zero")])
def test_asymmetric_integers_of_compressed_tensors(name: str) -> None:
    """Scales, zero points and codes, but for ties: they add the zero point before rounding to even, bitpress afterwards."""
    vectors, fmt = golden("compressed_tensors"), parse_format(f"{name}-fp32")
    bits = fmt.grid.code_bits
    w = vectors["int/w"]
    params = fmt.fit(w)
    assert same(params["scale"], vectors[f"{name}/scale"])
    assert torch.equal(params["zero"].int() - (1 << (bits - 1)), vectors[f"{name}/zero"].int())
    foreign = dense.unpack(as_bytes(vectors[f"{name}/packed"]), bits, w.shape[1])
    ours = fmt.encode(w, params)
    blocks = w.view(w.shape[0], -1, fmt.block.resolve((16, 128), 1)[1])
    scaled = blocks / params["scale"][..., None]
    tie = ((scaled - scaled.floor() == 0.5) & (params["zero"][..., None] % 2 == 1)).reshape(w.shape)
    assert tie.any() or bits != 4
    assert torch.equal((ours.int() - foreign.int()).abs(), tie.int())
    if f"{name}/decoded" in vectors:
        packed = stored(fmt.name, foreign, **params)
        assert torch.equal(packed.dequantize(), vectors[f"{name}/decoded"])
    # Zero points lie down a column there, in words of 32 bits.
    words = as_bytes(vectors[f"{name}/packed_zero"].T)
    down = dense.unpack(words[:, : dense.row_bytes(w.shape[0], bits)].contiguous(), bits, w.shape[0])
    assert torch.equal(down.T.int(), params["zero"].int())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_mx_of_compressed_tensors_decodes_to_its_numbers(name: str) -> None:
    """OCP takes the floor of the largest magnitude's exponent, compressed-tensors rounds it; codes under its scales are equal."""
    vectors, fmt = golden("compressed_tensors"), parse_format(name)
    packed = Packed(fmt, (6, 64), {"codes": vectors[f"{name}/packed"], "scale": vectors[f"{name}/scale"]})
    codes = fmt.encode(vectors["float/w"], packed.unpack_params())
    assert torch.equal(codes, packed.unpack_codes())
    assert torch.equal(packed.dequantize(), vectors[f"{name}/decoded"])
    ratio = packed.unpack_params()["scale"] / fmt.fit(vectors["float/w"])["scale"]
    mantissa = torch.frexp(vectors["float/w"].view(6, 2, 32).abs().amax(-1))[0] * 2
    rounded_up = mantissa >= (1.9375 if name == "mxfp6" else 1.75)
    assert rounded_up.any()
    assert torch.equal(ratio, 1.0 + rounded_up)


def test_nvfp4_of_compressed_tensors_decodes_to_its_numbers() -> None:
    """It keeps the inverse of the tensor's scale and divides by it: a product with the rounded inverse is two roundings away."""
    vectors, fmt = golden("compressed_tensors"), parse_format("nvfp4")
    tensors = {
        "codes": vectors["nvfp4/packed"],
        "scale": vectors["nvfp4/scale"],
        "scale_tensor": 1 / vectors["nvfp4/global"],
    }
    packed = Packed(fmt, (6, 64), tensors)
    codes = fmt.encode(vectors["float/w"], packed.unpack_params())
    assert torch.equal(codes, packed.unpack_codes())
    torch.testing.assert_close(packed.dequantize(), vectors["nvfp4/decoded"], rtol=2.0**-22, atol=0)


# gguf: blocks of bytes. `halves` and `nibbles` are how llama.cpp lays them out, and all that a converter has to know.
def blocks_of(name: str) -> torch.Tensor:
    """Return the bytes of every block, `[blocks, bytes]`."""
    raw = golden("gguf")[f"{name}/bytes"]
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "MXFP4": 17, "TQ1_0": 54, "TQ2_0": 66, "IQ4_NL": 18}
    return raw.reshape(-1, sizes.get(name, raw.shape[-1]))


def halves(block: torch.Tensor) -> torch.Tensor:
    """Read float16 numbers: `[blocks, 2 n]` bytes -> `[blocks, n]`."""
    return block.contiguous().view(torch.float16).float()


def nibbles(block: torch.Tensor) -> torch.Tensor:
    """Low halves of all bytes, then their high halves."""
    return torch.cat([block & 15, block >> 4], -1)


def bits_of(block: torch.Tensor) -> torch.Tensor:
    return dense.unpack(block.contiguous(), 1, block.shape[1] * 8)


def assert_decodes(name: str, fmt: str, codes: torch.Tensor, scale: torch.Tensor, exact: bool = True) -> None:
    decoded = golden("gguf")[f"{name}/decoded"]
    packed = stored(fmt, codes.reshape(decoded.shape), scale=scale.reshape(decoded.shape[0], -1))
    packed.check()
    if exact:
        assert same(packed.dequantize(), decoded)
    else:
        assert torch.equal(packed.dequantize(), decoded)


def test_q4_0_q5_0_and_q8_0_of_gguf_are_symmetric_integers() -> None:
    """Q4_0 and Q5_0 have a scale of either sign, which puts the largest magnitude on the lowest level."""
    block = blocks_of("Q4_0")
    assert_decodes("Q4_0", "int4-g32", nibbles(block[:, 2:]), halves(block[:, :2]))
    assert (halves(block[:, :2]) < 0).any()
    block = blocks_of("Q5_0")
    assert_decodes("Q5_0", "int5-g32", nibbles(block[:, 6:]) | bits_of(block[:, 2:6]) << 4, halves(block[:, :2]))
    block = blocks_of("Q8_0")
    assert_decodes("Q8_0", "int8-g32", block[:, 2:] ^ 128, halves(block[:, :2]))


def test_ternary_of_gguf() -> None:
    block = blocks_of("TQ2_0")
    codes = torch.stack([block[:, :64].view(-1, 2, 32) >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 256)
    assert_decodes("TQ2_0", "ternary-g256", codes, halves(block[:, 64:]))
    # Five digits a byte as in base3, but the byte is a fraction of 256: its digits come off the top by multiplying by three.
    block = blocks_of("TQ1_0")
    digits = [(block[:, :52].int() * 3**i & 255) * 3 >> 8 for i in range(5)]
    parts = [d[:, :32] for d in digits] + [d[:, 32:48] for d in digits] + [d[:, 48:] for d in digits[:4]]
    codes = torch.cat(parts, 1)
    assert_decodes("TQ1_0", "ternary-g256", codes.to(torch.uint8), halves(block[:, 52:]))


def test_mxfp4_of_gguf() -> None:
    """Its scale is OCP's, on levels twice as large. Ties go to the smaller magnitude there, and there is no negative zero."""
    block, fmt, w = blocks_of("MXFP4"), parse_format("mxfp4"), golden("gguf")["w"]
    theirs = nibbles(block[:, 1:]).view(w.shape)
    packed = Packed(
        fmt, (w.shape[0], w.shape[1]), {"codes": dense.pack(theirs, 4), "scale": block[:, :1].reshape(w.shape[0], -1)}
    )
    assert torch.equal(packed.dequantize(), golden("gguf")["MXFP4/decoded"])
    params = fmt.fit(w)
    assert torch.equal(fmt.store.pack(params["scale"], {})[""], packed.tensors["scale"])
    ours = fmt.encode(w, params)
    scaled = (w.view(w.shape[0], -1, 32) / params["scale"][..., None]).reshape(w.shape).abs()
    up = (scaled == 0.75) | (scaled == 1.75) | (scaled == 3.5)  # ties that even codes lie above
    assert up.any()
    assert torch.equal((ours & 7).int() - (theirs & 7).int(), up.int())
    assert torch.equal(theirs >> 3, ((theirs & 7 > 0) & (w < 0)).to(torch.uint8))


def test_iq4_nl_of_gguf() -> None:
    assert torch.equal(levels("iq4nl"), golden("gguf")["IQ4_NL/levels"])
    block = blocks_of("IQ4_NL")
    assert_decodes("IQ4_NL", "iq4nl-g32", nibbles(block[:, 2:]), halves(block[:, :2]))


def test_super_blocks_of_gguf_without_a_minimum() -> None:
    """A scale of a scale, multiplied out in float32 as the tool does: nothing is lost but the bytes saved."""
    block = blocks_of("Q6_K")
    low, high, small = block[:, :128].view(-1, 2, 64), block[:, 128:192].view(-1, 2, 32), block[:, 192:208].view(torch.int8)
    low = torch.stack([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    scale = halves(block[:, 208:]) * small.float()
    assert_decodes("Q6_K", "int6-g16-fp32", low | high << 4, scale)
    # Q3_K: two bits, a third one apart, and 16 scales of 6 bits less 32.
    block = blocks_of("Q3_K")
    third = torch.stack([block[:, :32] >> i & 1 for i in range(8)], 1).view(-1, 256)
    codes = torch.stack([block[:, 32:96].view(-1, 2, 32) >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 256)
    low = nibbles(block[:, 96:104])
    high = torch.cat([block[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    scale = halves(block[:, 108:]) * ((low | high << 4).float() - 32)
    assert_decodes("Q3_K", "int3-g16-fp32", codes | third << 2, scale)


def assert_decodes_with_a_minimum(
    name: str, bits: int, group: int, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor
) -> None:
    """No grid has a minimum that is a float: it is a term of its own, a sign that is always 1."""
    decoded = golden("gguf")[f"{name}/decoded"]
    rows = decoded.shape[0]
    zero = torch.zeros(rows, decoded.shape[1] // group)
    codes = codes.reshape(decoded.shape)
    steps = stored(f"int{bits}-g{group}-zero-fp32", codes, scale=scale.reshape(rows, -1), zero=zero)
    lowest = stored(f"binary-g{group}-fp32", torch.ones_like(codes), scale=low.reshape(rows, -1))
    assert torch.equal(CompressedWeight((steps, lowest)).dequantize(), decoded)


def test_q4_1_and_q5_1_of_gguf_are_steps_and_a_minimum() -> None:
    block = blocks_of("Q4_1")
    assert_decodes_with_a_minimum("Q4_1", 4, 32, nibbles(block[:, 4:]), halves(block[:, :2]), halves(block[:, 2:4]))
    block = blocks_of("Q5_1")
    codes = nibbles(block[:, 8:]) | bits_of(block[:, 4:8]) << 4
    assert_decodes_with_a_minimum("Q5_1", 5, 32, codes, halves(block[:, :2]), halves(block[:, 2:4]))


def test_super_blocks_of_gguf_with_a_minimum() -> None:
    block = blocks_of("Q2_K")
    codes = torch.stack([block[:, 16:80].view(-1, 2, 32) >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    scale = halves(block[:, 80:82]) * (block[:, :16] & 15).float()
    low = -(halves(block[:, 82:]) * (block[:, :16] >> 4).float())
    assert_decodes_with_a_minimum("Q2_K", 2, 16, codes, scale, low)
    for name, bits in (("Q4_K", 4), ("Q5_K", 5)):
        block = blocks_of(name)
        # Scales and minimums of 6 bits: of the first four all six in a byte, of the others the high two beside those.
        first, second, rest = block[:, 4:8], block[:, 8:12], block[:, 12:16]
        scale = torch.cat([first & 63, rest & 15 | first >> 2 & 48], 1).float() * halves(block[:, :2])
        low = -torch.cat([second & 63, rest >> 4 | second >> 2 & 48], 1).float() * halves(block[:, 2:4])
        codes = torch.stack([block[:, -128:].view(-1, 4, 32) & 15, block[:, -128:].view(-1, 4, 32) >> 4], 2).view(-1, 8, 32)
        if bits == 5:
            codes = codes | torch.stack([block[:, 16:48] >> i & 1 for i in range(8)], 1) << 4
        assert_decodes_with_a_minimum(name, bits, 32, codes, scale, low)


def test_iq4_xs_of_gguf() -> None:
    block = blocks_of("IQ4_XS")
    low = torch.stack([block[:, 4:8] & 15, block[:, 4:8] >> 4], -1).view(-1, 8)
    high = torch.stack([block[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], -1).view(-1, 8)
    scale = halves(block[:, :2]) * ((low | high << 4).float() - 32)
    assert_decodes("IQ4_XS", "iq4nl-g32-fp32", nibbles(block[:, 8:].reshape(-1, 16)), scale)


def test_nvfp4_of_gguf() -> None:
    """Its scales are those of NVFP4 without the tensor's, on levels twice as large and scales half as large."""
    block = blocks_of("NVFP4")
    fmt = parse_format("nvfp4")
    codes = nibbles(block[:, 4:].reshape(-1, 8)).view(-1, 64)
    tensors = {"codes": dense.pack(codes, 4), "scale": block[:, :4].contiguous(), "scale_tensor": torch.ones(1)}
    packed = Packed(fmt, (codes.shape[0], 64), tensors)
    packed.check()
    assert torch.equal(packed.dequantize(), golden("gguf")["NVFP4/decoded"])
