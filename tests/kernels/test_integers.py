"""Products of whole numbers: the native engine rounds inputs to the codes of the law, adds up the same whole numbers, and scales them within
the law's bound, on every code path that this processor runs and with the instructions on tiles written out ("emulated").
"""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from bitpress import native
from bitpress.errors import FormatError, NumericsError
from bitpress.formats import ActivationFormat, CompressedLayer, CompressedWeight, parse_format
from bitpress.formats.channels import InputFormat, build_input
from bitpress.formats.maps.map import Permutation
from bitpress.formats.maps.rotations import Hadamard
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels.integers import is_integer_product, multiply_integers, refuses_input, round_input
from bitpress.kernels.native_layout import NativeLayout, lay_out

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

PATHS: list[str] = [*native.library().paths(), "emulated"] if native.available() else []
GUARD = 64
DYNAMIC = [
    "int8-row-fp32",
    "int8-row",
    "int8-row-zero-bf16",
    "int8-g32-zero-fp32",
    "int6-row-fp32",
    "int4-g16",
    "int2-row-zero",
    "int1-row-zero",
]
STATIC = ["int8-tensor", "int8-tensor-zero", "int5-tensor-zero-fp32"]
WEIGHTS = [
    "int8-row",
    "int8-row-zero",
    "int7-g32",
    "int6-g32-zero-fp32",
    "int4-g64",
    "int4-g16-zero",
    "int3-g64",
    "int3-g24",
    "int2-row-bf16",
]
WEIGHTS += ["int8-tensor", "int4-3x48-e8m0", "int4-g64-zero-s6", "int5-g96-fp8over"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Draw rows of different magnitudes: the second is zeros, the third positive, the fourth has one value far above the others."""
    x = torch.randn(count, columns, generator=generator(seed)) * torch.randn(count, 1, generator=generator(seed + 1)).exp()
    x[1:2] = 0.0
    x[2:3].abs_()
    x[3:4, columns // 2] = 1e4
    return x


def made_input(name: str, x: torch.Tensor) -> InputFormat:
    if " first " in name:
        rest, _, first = name.partition(" first ")
        return build_input({"format": rest, "parameters": "dynamic", "first": first}, {})
    fmt = parse_format(name)
    return ActivationFormat.static(fmt, fmt.fit(x)) if fmt.block.name == "tensor" else ActivationFormat(fmt)


def press(name: str, w: torch.Tensor) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def made_layer(weights: str, inputs: str, shape: tuple[int, int], seed: int = 2) -> CompressedLayer:
    w = torch.randn(shape, generator=generator(seed)) * torch.randn(shape[0], 1, generator=generator(seed + 1)).exp() * 0.02
    w[shape[0] // 2] = 0.0
    return CompressedLayer(CompressedWeight((press(weights, w),)), made_input(inputs, rows_of(6, shape[1])[[0, 2, 4, 5]] * 0.7))


@functools.cache
def multiplier(path: str) -> Any:
    return native.library().Multiplier(1, path)


def product(strips: NativeLayout, x: torch.Tensor, path: str, in_bytes: bool = True) -> torch.Tensor:
    """Multiply into poisoned memory between two guards."""
    memory = np.full(x.shape[0] * strips.shape[0] + 2 * GUARD, np.nan, np.float32)
    memory[:GUARD] = memory[-GUARD:] = 0.5
    out = memory[GUARD:-GUARD].reshape(x.shape[0], strips.shape[0])
    multiplier(path).multiply(strips.linear, x.numpy(), out, in_bytes)
    assert (memory[:GUARD] == 0.5).all(), "written before the output"
    assert (memory[-GUARD:] == 0.5).all(), "written behind the output"
    return torch.from_numpy(out.copy())


def native_codes(
    strips: NativeLayout, x: torch.Tensor, blocks: int, path: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(x.shape[0], blocks)
    zeros = torch.zeros(x.shape[0], blocks, dtype=torch.int32)
    for i, row in enumerate(x):
        strips.linear.round_input(row.numpy(), codes[i].numpy(), scales[i].numpy(), zeros[i].numpy(), path)
    return codes.long(), zeros.long(), scales


# ---- inputs ----


@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC])
def test_inputs_become_the_codes_of_the_law(name: str) -> None:
    fmt = parse_format(name)
    columns = 96 if fmt.block.name.startswith("g") else 91
    x = rows_of(9, columns)
    x[4] = (torch.arange(columns) - 40) * 0.5  # halves: to even
    x[5] = -x[5].abs()
    x[6] *= 1e-30 if fmt.scale == "fp32" else 1e-7
    x[7] *= 1e30 if fmt.scale == "fp32" else 1e3
    x[8] = 3e-45
    inputs = made_input(name, x[:4])
    if inputs.parameters == "static":
        x[7, :3] = torch.tensor([3e38, -3e38, 1e25])
    strips = lay_out(made_layer("int8-row", name, (3, columns)).weight, inputs=inputs)
    wanted = round_input(x, inputs)
    for path in PATHS:
        codes, zeros, scales = native_codes(strips, x, wanted.scales.shape[1], path)
        assert torch.equal(codes, wanted.codes), path
        assert torch.equal(zeros, wanted.zeros), path
        assert torch.equal(scales.view(torch.int32), wanted.scales.contiguous().view(torch.int32)), path
    values = (wanted.codes - wanted.zeros.repeat_interleave(columns // wanted.zeros.shape[1], 1)).float()
    assert torch.equal(values * wanted.scales.repeat_interleave(columns // wanted.scales.shape[1], 1), inputs.round(x))


def test_a_scale_beyond_its_type_is_an_error() -> None:
    layer = made_layer("int8-row", "int8-row", (3, 32))
    x = torch.full((1, 32), 1e8)
    assert layer.input is not None
    with pytest.raises(NumericsError):
        round_input(x, layer.input)
    strips = lay_out(layer.weight, inputs=layer.input)
    with pytest.raises(OverflowError, match="scale"):
        product(strips, x, PATHS[0])


# ---- sums ----


@pytest.mark.parametrize("weights", ["int8-row", "int8-g32-zero", "int6-row-zero", "int3-g64", "int2-row"])
@pytest.mark.parametrize("inputs", ["int8-tensor-fp32", "int8-tensor-zero-fp32", "int4-tensor-zero-fp32"])
def test_sums_are_exact(weights: str, inputs: str) -> None:
    """With scales of 1 a product is its sums: whole numbers, every code and every zero point at its ends among them."""
    shape, generate = (21, 192), generator(3)
    fmt, of_inputs = parse_format(weights), parse_format(inputs)
    down, across = fmt.block_grid(shape)
    top, most = (1 << fmt.grid.code_bits) - 1, (1 << of_inputs.grid.code_bits) - 1
    codes = torch.randint(0, top + 1, shape, generator=generate).to(torch.uint8)
    codes[0], codes[1] = 0, top
    params = {"scale": torch.ones(down, across), "zero": torch.randint(0, top + 1, (down, across), generator=generate).float()}
    params["zero"][0], params["zero"][1] = top, 0
    term = Packed.pack(fmt, codes, {p.name: params[p.name] for p in fmt.grid.params})
    zero = {"zero": torch.full((1, 1), float(most))} if of_inputs.grid.name and inputs.endswith("zero-fp32") else {}
    layer = CompressedLayer(CompressedWeight((term,)), ActivationFormat.static(of_inputs, {"scale": torch.ones(1, 1), **zero}))
    strips = lay_out(layer.weight, inputs=layer.input)
    assert strips.linear.reads == ["integers"]
    for count in (1, 3, 4, 70):
        x = torch.randint(-300, 300, (count, shape[1]), generator=generate).float()
        x[0] = -300.0
        wanted = multiply_integers(x, layer)
        for path in PATHS:
            assert torch.equal(product(strips, x, path).double(), wanted.exact), (path, count)
        assert torch.equal(wanted.sums[0].sum(2).double(), wanted.exact)


# ---- rotations before the rounding ----

# Widths and blocks: cores of 36, 20, 12 and 148 rows beside Walsh's matrices of 1 to 256; blocks narrower than a vector.
ROTATIONS = [(576, 576), (80, 80), (192, 24), (444, 148), (2368, 2368), (256, 256), (200, 8), (36, 12), (96, 32)]


@pytest.mark.parametrize(("columns", "block"), ROTATIONS)
def test_rows_are_rotated_and_rounded_as_one_after_the_other(columns: int, block: int) -> None:
    """Rotated rows are within the bound of exact ones and alike on every code path; rounding them at once changes no bit."""
    rotation = Hadamard.random(columns, block, generator(7))
    eye = torch.eye(columns)
    rotating = lay_out(CompressedWeight((sparse(eye, eye > 0),), rotation))
    w = torch.randn(17, columns, generator=generator(8))
    given = ActivationFormat(parse_format("int8-row-fp32"))
    at_once = lay_out(CompressedWeight((press("int8-row", w),), rotation), inputs=given)
    after = lay_out(CompressedWeight((press("int8-row", w),)), inputs=given)
    # A value is rounded once as a product, and once for every addition on its way: of Walsh's matrix, of four rows of the core, and of
    # all of its fours. The factor 1 / sqrt(block) is rounded too.
    along = block // rotation.core
    roundings = (2 + along.bit_length() - 1 + 2 + rotation.core // 4) * 2.0**-24
    for count in (1, 6):
        x = rows_of(count, columns)
        exact = rotation.apply(x.double())
        size = (x.double().abs().reshape(-1, block).sum(1) / block**0.5).reshape(count, -1).repeat_interleave(block, 1)
        rows = {path: product(rotating, x, path) for path in PATHS}
        for path, y in rows.items():
            assert ((y.double() - exact).abs() <= size * roundings / (1 - roundings)).all(), (path, count)
            assert torch.equal(y, rows[PATHS[0]]), (path, count)
            assert torch.equal(product(at_once, x, path), product(after, y, path)), (path, count)
        codes, zeros, scales = native_codes(at_once, x, 1, PATHS[0])
        wanted = round_input(rows[PATHS[0]], given)
        assert torch.equal(codes, wanted.codes)
        assert torch.equal(zeros, wanted.zeros)
        assert torch.equal(scales, wanted.scales)


# ---- leading channels in more bits ----

FIRST = [
    "int4-row-fp32 first 48 int8-row-fp32",
    "int4-g16-zero-bf16 first 96 int8-row-fp32",
    "int8-row first 48 int4-g24-zero-fp32",
]


@pytest.mark.parametrize("inputs", FIRST)
@pytest.mark.parametrize("weights", ["int4-row", "int8-g64-zero", "int3-g24", "int4-tensor"])
def test_leading_channels_are_rounded_apart(inputs: str, weights: str) -> None:
    layer = made_layer(weights, inputs, (39, 192))
    if (weights, inputs) in [
        ("int3-g24", FIRST[1]),
        ("int8-g64-zero", FIRST[2]),
    ]:  # scales would be repeated for every 8 columns
        assert not is_integer_product(layer.weight.spec(), layer.input_spec())
        return
    strips = lay_out(layer.weight, inputs=layer.input)
    assert strips.linear.reads == ["integers"]
    library = native.library()
    again = NativeLayout(library.restore_linear(library.store_linear(strips.linear)), strips.shape)
    assert layer.input is not None
    for count in (1, 4, 37):
        x = rows_of(count, 192, seed=count)
        given, wanted = round_input(x, layer.input), multiply_integers(x, layer)
        for path in PATHS:
            codes, zeros, scales = native_codes(strips, x, given.scales.shape[1], path)
            assert torch.equal(codes, given.codes), path
            assert torch.equal(zeros, given.zeros), path
            assert torch.equal(scales, given.scales), path
            y = product(strips, x, path)
            assert ((y.double() - wanted.exact).abs() <= wanted.bound).all(), (path, count)
        assert torch.equal(product(again, x, PATHS[0]), product(strips, x, PATHS[0]))
        values = (given.codes - given.zeros.repeat_interleave(192 // given.zeros.shape[1], 1)).float()
        assert torch.equal(values * given.scales.repeat_interleave(192 // given.scales.shape[1], 1), layer.input.round(x))


def test_leading_channels_that_cut_rows_too_finely_are_computed_from_values() -> None:
    layer = made_layer("int4-row", "int4-row-fp32 first 37 int8-row-fp32", (39, 192))
    assert not is_integer_product(layer.weight.spec(), layer.input_spec())
    assert layer.input is not None
    strips = lay_out(layer.weight, inputs=layer.input)
    assert strips.linear.reads == ["floats"]
    for count in (2, 9):
        x = rows_of(count, 192)
        values, w = layer.input.round(x).double(), layer.weight.dequantize().double()
        for path in PATHS:
            y = product(strips, x, path).double()
            assert ((y - values @ w.T).abs() <= values.abs() @ w.abs().T * 200 * 2.0**-24).all(), (path, count)


def test_a_bad_range_of_leading_channels_is_an_error() -> None:
    good = {"bits": 8, "has_zero": False, "group": 8, "kind": "fp32"}
    for bad in (
        {"columns": 0},
        {"columns": 32},
        {"columns": 8, "group": 9},
        {"columns": 8, "bits": 9},
        {"columns": 8, "kind": "e8m0"},
    ):
        with pytest.raises(ValueError, match=r"must|are kept in"):
            native.library().Linear(4, 32).set_rounding({**good, "first": {**good, **bad}})
    with pytest.raises(ValueError, match="a fixed scale is for all columns"):
        native.library().Linear(4, 32).set_rounding({**good, "scale": 1.0, "zero": 0, "first": {**good, "columns": 8}})


# ---- products ----


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", ["int8-row-fp32", "int8-g32-zero-fp32", "int8-tensor-zero", "int6-row"])
def test_products_are_within_the_bound(weights: str, inputs: str) -> None:
    layer = made_layer(weights, inputs, (39, 192))
    bias = torch.randn(39, generator=generator(5))
    strips = lay_out(layer.weight, bias, layer.input)
    assert strips.linear.reads == ["integers"]
    for count in (1, 2, 3, 4, 5, 37):
        x = rows_of(count, 192, seed=count)
        wanted = multiply_integers(x, layer, bias)
        assert ((wanted.y.double() - wanted.exact).abs() <= wanted.bound).all()
        for path in PATHS:
            y = product(strips, x, path)
            assert ((y.double() - wanted.exact).abs() <= wanted.bound).all(), (path, count)
            assert torch.equal(y, product(strips, x, path, in_bytes=False)), "the engine's own rounding has no say"


@pytest.mark.parametrize("columns", [4, 36, 100, 576, 2052])
@pytest.mark.parametrize("weights", ["int8-row", "int3-row"])
def test_any_number_of_columns_and_rows(weights: str, columns: int) -> None:
    layer = made_layer(weights, "int8-row-zero-fp32", (17, columns))
    strips = lay_out(layer.weight, inputs=layer.input)
    for count in (1, 130, 193):
        x = rows_of(count, columns)
        wanted = multiply_integers(x, layer)
        for path in PATHS:
            assert ((product(strips, x, path).double() - wanted.exact).abs() <= wanted.bound).all(), (path, count)


def test_the_bound_notices_another_order() -> None:
    """Scaling codes before they are added up, or rounding the scale once more, is beyond the bound: it can fail."""
    layer = made_layer("int8-row", "int8-row-fp32", (39, 576))
    x = rows_of(8, 576)
    wanted = multiply_integers(x, layer)
    assert layer.input is not None
    rounded = layer.input.round(x) @ layer.weight.dequantize().T
    assert not ((rounded.double() - wanted.exact).abs() <= wanted.bound).all()


# ---- beside integers, and what are none ----


@pytest.mark.parametrize("inputs", ["int8-row-fp32", "int8-tensor-zero"])
def test_other_terms_read_the_values_of_the_codes(inputs: str) -> None:
    """Low-rank factors and outliers stand beside sums of whole numbers; weights of other grids are multiplied with rounded values."""
    w = torch.randn(24, 64, generator=generator(0)) * 0.05
    order = Permutation(torch.randperm(64, generator=generator(1)))
    given = made_input(inputs, rows_of(6, 64)[[0, 2, 4, 5]])
    beside = CompressedWeight((press("int4-g32", w), low_rank(w * 0.1, 4), sparse(w, w.abs() > 0.12)), order)
    others = [CompressedWeight((press(name, w),)) for name in ("nf4-g32", "e4m3-row", "int4-g32-min", "e8p-row", "int8-g2")]
    for weight, reads in [(beside, ["integers"]), *[(weight, ["floats"]) for weight in others]]:
        layer = CompressedLayer(weight, given)
        assert is_integer_product(weight.spec(), layer.input_spec()) == (reads == ["integers"])
        strips = lay_out(weight, inputs=given)
        assert strips.linear.reads == (reads if weight is not others[-1] else [])
        for count in (1, 3, 9):
            x = rows_of(count, 64)
            moved = x if weight.input_map is None else weight.input_map.apply(x)
            values = given.round(moved).double()
            decoded = sum((term.dequantize().double() for term in weight.terms), torch.zeros(24, 64).double())
            exact = values @ decoded.T
            size = (
                values.abs() @ sum((term.dequantize().double().abs() for term in weight.terms), torch.zeros(24, 64).double()).T
            )
            # 16 bits of factors and of weights that are expanded; sums of at most 64 columns in float32.
            allowed = size * (2.0**-10 + 100 * 2.0**-24) + 1e-30
            for path in PATHS:
                for in_bytes in (True, False):
                    y = product(strips, x, path, in_bytes).double()
                    assert ((y - exact).abs() <= allowed).all(), (path, count, reads)


def test_a_layout_comes_back_from_arrays() -> None:
    x = {count: rows_of(count, 192) for count in (2, 9)}
    for inputs in ("int8-row-fp32", "int8-g32-zero-bf16", "int8-tensor-zero"):
        layer = made_layer("int4-g64", inputs, (20, 192))
        strips = lay_out(layer.weight, inputs=layer.input)
        library = native.library()
        again = NativeLayout(library.restore_linear(library.store_linear(strips.linear)), strips.shape)
        assert again.linear.reads == ["integers"]
        for rows in x.values():
            assert torch.equal(product(again, rows, PATHS[0]), product(strips, rows, PATHS[0]))


def test_what_is_no_product_of_whole_numbers_is_said() -> None:
    def spec(weights: str, columns: int = 64) -> dict[str, Any]:
        return CompressedWeight((press(weights, torch.randn(8, columns, generator=generator(0))),)).spec()

    dynamic = {"format": "int8-row", "parameters": "dynamic"}
    assert is_integer_product(spec("int3-g32"), dynamic)
    assert not is_integer_product(spec("nf4-g32"), dynamic)
    assert not is_integer_product(spec("int4-g64-dq"), {"format": "int8-g32", "parameters": "dynamic"})
    assert is_integer_product(spec("int4-g64-dq"), dynamic)
    assert not is_integer_product(spec("int3-g32"), None)
    assert refuses_input({"format": "e4m3-row", "parameters": "dynamic"}) == "inputs in e4m3-row are no integers"
    assert "scales in e8m0" in str(refuses_input({"format": "int8-g32-e8m0", "parameters": "dynamic"}))
    assert refuses_input({"format": "int8-tensor-e8m0", "parameters": "static"}) is None
    assert refuses_input({**dynamic, "shift": "float32"}) == "channels of inputs are not rounded alike (shift)"
    assert "(copies)" in str(refuses_input({**dynamic, "copies": "uint8", "first": "16 int8-row-fp32"}))
    assert refuses_input({**dynamic, "first": "16 int4-row-fp32"}) is None
    assert refuses_input({**dynamic, "first": {"share": 0.1, "format": "e4m3-row"}}) == "inputs in e4m3-row are no integers"
    assert "local parameters" in str(refuses_input({"format": "int4-g16-fp8over", "parameters": "local"}))
    with pytest.raises(FormatError, match="whole numbers"):
        multiply_integers(torch.zeros(1, 64), made_layer("nf4-g32", "int8-row", (8, 64)))
