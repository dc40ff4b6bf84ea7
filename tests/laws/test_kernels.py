"""Laws of kernels: every row of the table against decoded weights in float64, over every format of the table that it takes.

    |y - x w_hat'| <= (IN + 2 * (groups + 1) + 4) * 2^-24 * |x| |w_hat|' + eps(type) * |x w_hat'|

A kernel may add up in any order, in float32 at least: at most IN roundings. A group's sum is scaled and its zero point, or the offset
of its levels, taken away apart: two roundings a group, and the whole of a group's codes counts where a zero point is taken away, so
that |w_hat| there is |codes| + |zero| times the scale. Then one rounding to the type of x. The reference decodes the weight into the
type of x besides: eps(type) * |x| |w_hat|' more.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import GRIDS, SHORT, CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.formats.scale_runs import RunCodes
from bitpress.kernels import KERNELS

EXTRAS = (
    "int4-g16-zero-s6",
    "int8-row",
    "int4-row-fp8",
    "ternary-g32-base3",
    "e2m3-g32-split",
    "nf4-g16-dq",
    "int4-tensor",
    "int4-2x16-zero",
)
FORMATS = (*(row.in_block("g16") for row in GRIDS.values()), *SHORT, *EXTRAS)
# Rows of x: none, one, a few below and above the tiles of kernels, and more than a block of them.
ROWS = (0, 1, 2, 3, 5, 8, 17, 33, 70)
# Outputs and groups of inputs: odd ones, one alone, and more than a tile.
SHAPES = ((6, 1), (38, 3), (66, 5))
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def compress(name: str, out: int, groups: int, seed: int) -> CompressedWeight:
    fmt = parse_format(name)
    cols = groups * (fmt.block.cols if isinstance(fmt.block.cols, int) else 32)
    cols *= fmt.store.run if isinstance(fmt.store, RunCodes) else 1
    w = torch.randn(out, cols, generator=torch.Generator().manual_seed(seed))
    params = fmt.fit(w)
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))


def bound(kernel: str, x: torch.Tensor, decoded: torch.Tensor, groups: int) -> torch.Tensor:
    """Return how far a product may be from the exact one."""
    eps = torch.finfo(x.dtype).eps
    # Levels lie within the largest of the weight beside zero: a code and its zero point are each within twice that of a row.
    size = decoded.abs() + 2 * decoded.abs().amax(1, keepdim=True)
    roundings = decoded.shape[1] + 2 * (groups + 1) + 4
    exact = x.double() @ decoded.T
    products = x.double().abs() @ decoded.abs().T if kernel == "reference" else torch.zeros(())
    return roundings * 2.0**-24 * (x.double().abs() @ size.T) + eps * (exact.abs() + products)


def cases() -> Iterator[Any]:
    """Every kernel and format, with a shape and a type by turns; the others are for a release."""
    for kernel in KERNELS:
        for turn, name in enumerate(FORMATS):
            for i, (shape, dtype) in enumerate((s, t) for s in SHAPES for t in TYPES):
                marks = () if i == turn % (len(SHAPES) * len(TYPES)) else (pytest.mark.release,)
                label = f"{kernel}-{name}-{shape[0]}x{shape[1]}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(kernel, name, shape, dtype, marks=marks, id=label)


@pytest.mark.parametrize(("kernel", "name", "shape", "dtype"), list(cases()))
def test_products_are_those_of_decoded_weights(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    try:
        weight = compress(name, *shape, seed=1)
    except FormatError:  # a block with more rows than divide the outputs
        weight = compress(name, 64, shape[1], seed=1)
    layer = CompressedLayer(weight)
    refusal = KERNELS[kernel].refuses(layer)
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
        assert kernel != "reference", "the last row of the table takes every weight"
        return
    decoded = weight.dequantize().double()
    out, inner = weight.shape
    made = KERNELS[kernel]()
    for rows in ROWS:
        x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = made.matmul(x, layer)
        assert y.dtype == dtype
        assert y.shape == (rows, out)
        assert torch.all((y.double() - x.double() @ decoded.T).abs() <= bound(kernel, x, decoded, shape[1])), rows
    single = made.matmul(x[0], layer)
    assert single.shape == (out,)
    assert torch.all((single.double() - x[0].double() @ decoded.T).abs() <= bound(kernel, x[:1], decoded, shape[1])[0])


def test_the_native_kernel_takes_the_usual_formats() -> None:
    """What runs at full speed: a refusal of one of these would send it to the reference in silence."""
    if KERNELS["native"].refuses(CompressedLayer(compress("int4-g16", 6, 1, 1))) == "the native library is not there":
        pytest.skip("no C++ compiler was there when bitpress was installed")
    taken = {name for name in FORMATS if KERNELS["native"].refuses(CompressedLayer(compress(name, 64, 2, seed=1))) is None}
    assert taken >= {"int2-g16", "int3-g16", "int4-g16", "int8-row", "nf4-g16", "mxfp4", "nvfp4"}


def test_a_product_that_is_a_little_wrong_would_be_seen() -> None:
    weight = compress("int4-g16", 38, 3, seed=1)
    decoded = weight.dequantize().double()
    x = torch.randn(4, decoded.shape[1], generator=torch.Generator().manual_seed(2))
    wrong = decoded.clone()
    wrong[5, 7] += 1e-3 * decoded.abs().max()  # a hundredth of a step of four bits
    assert bool(((x.double() @ (wrong - decoded).T).abs() > bound("reference", x, decoded, 3)).any())
