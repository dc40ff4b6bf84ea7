"""The native product in the reference's place: the same numbers up to rounding, laid out once, and never where it would round."""

import gc

import pytest
import torch

from bitpress import native
from bitpress.formats import CompressedWeight, parse_format
from bitpress.formats.maps.map import Permutation
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels import KERNELS, choose_kernel
from bitpress.kernels import native as module
from bitpress.kernels.native import Native
from bitpress.kernels.reference import Reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

CPU = torch.device("cpu")
OUT, IN = 40, 96


def packed(name: str, w: torch.Tensor) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def weight(name: str = "int4-g32-zero", rest: str = "") -> CompressedWeight:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(OUT, IN, generator=generator)
    term = packed(name, w)
    if rest == "order":
        return CompressedWeight((term,), Permutation(torch.randperm(IN, generator=generator).to(torch.int32)))
    left = w - term.dequantize()
    more = {"": (), "low_rank": (low_rank(left, 3),), "sparse": (sparse(left, left.abs() > 0.2),)}[rest]
    return CompressedWeight((term, *more))


@pytest.mark.parametrize("rest", ["", "low_rank", "sparse", "order"])
@pytest.mark.parametrize("name", ["int4-g32-zero", "int2-g32", "int8-row", "nf4-g32", "mxfp4", "nvfp4"])
def test_products_are_the_references(name: str, rest: str) -> None:
    w = weight(name, rest)
    assert choose_kernel(w, CPU) is Native
    decoded = w.dequantize().double()
    for shape in ((IN,), (1, IN), (2, 3, IN), (70, IN)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = x.to(dtype)
            y = Native.matmul(given, w)
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], OUT)
            exact = given.double() @ decoded.T
            # A sum of IN products in float32, its terms in any order, and two more roundings a term; then one to x's own type.
            bound = (IN + 4) * 2.0**-24 * (given.double().abs() @ decoded.abs().T) + torch.finfo(dtype).eps * exact.abs()
            if rest == "low_rank":  # two products in a row, the inner vector rounded as the outer sum is
                bound = bound * 3
            assert bool(((y.double() - exact).abs() <= bound).all())


def test_a_weight_is_laid_out_once_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    lay_out = module.lay_out
    monkeypatch.setattr(module, "lay_out", lambda w: made.append(w.shape) or lay_out(w))
    first, second = weight(), weight()
    before = len(module._held)
    for _ in range(3):
        assert torch.equal(Native.matmul(torch.ones(IN), first), Native.matmul(torch.ones(IN), second))
    assert len(made) == 2
    assert len(module._held) == before + 2
    del first
    gc.collect()
    assert len(module._held) == before + 1


def test_rows_beyond_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), torch.randn(11, IN, generator=torch.Generator().manual_seed(3))
    whole = Native.matmul(x, w)
    monkeypatch.setattr(module, "ROWS", 4)
    # Four rows at once take another path than eleven: the sums' order differs.
    assert torch.allclose(Native.matmul(x, w), whole, rtol=1e-5, atol=1e-5)
    assert Native.matmul(x[:0], w).shape == (0, OUT)


def test_x_may_be_any_view() -> None:
    w, x = weight(), torch.randn(IN, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(Native.matmul(x.T, w), Native.matmul(x.T.contiguous(), w))


def test_what_it_leaves_to_the_reference() -> None:
    w = weight()
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(5))
    assert torch.equal(Native.matmul(x.double(), w), Reference.matmul(x.double(), w))
    asked = x.clone().requires_grad_()
    Native.matmul(asked, w).sum().backward()
    assert asked.grad is not None
    assert torch.allclose(asked.grad, w.dequantize().sum(0).expand(2, IN))
    with torch.no_grad():
        assert not Native.matmul(asked, w).requires_grad


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    left = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(6))
    assert "meta" in (Native.refuses(w, torch.device("meta")) or "")
    assert "no layout" in (Native.refuses(CompressedWeight((packed("e4m3-row", left),)), CPU) or "")
    assert "packed" in (Native.refuses(CompressedWeight((*w.terms, low_rank(left, 2, "int8-row"))), CPU) or "")
    assert "several" in (Native.refuses(CompressedWeight((*w.terms, low_rank(left, 2), low_rank(left, 2))), CPU) or "")
    stack = CompressedWeight.stack_rows([CompressedWeight((packed("int4-tensor", left),))] * 2)
    assert Native.refuses(stack, CPU) is not None
    assert choose_kernel(stack, CPU) is Reference
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    assert "not there" in (Native.refuses(w, CPU) or "")
    assert choose_kernel(w, CPU) is Reference
    assert list(KERNELS) == ["native", "reference"]
