"""The native product in the reference's place: the same numbers up to rounding, laid out once, and never where it would round."""

from dataclasses import replace

import pytest
import torch

from bitpress import native
from bitpress.formats import ActivationFormat, CompressedLayer, CompressedWeight, parse_format
from bitpress.formats.maps.map import Permutation
from bitpress.formats.terms.kept import keep_columns
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels import KERNELS, choose_kernel
from bitpress.kernels import native as module
from bitpress.kernels.native import Native
from bitpress.kernels.reference import Reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

OUT, IN = 40, 96


def packed(name: str, w: torch.Tensor) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def multiply(x: torch.Tensor, w: CompressedWeight) -> torch.Tensor:
    return Native().matmul(x, CompressedLayer(w))


def weight(name: str = "int4-g32-zero", rest: str = "") -> CompressedWeight:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(OUT, IN, generator=generator)
    term = packed(name, w)
    if rest == "order":
        return CompressedWeight((term,), Permutation(torch.randperm(IN, generator=generator).to(torch.int32)))
    left = w - term.dequantize()
    more = {
        "": (),
        "low_rank": (low_rank(left, 3),),
        "sparse": (sparse(left, left.abs() > 0.2),),
        "factors in codes": (low_rank(left, 3, "int8-row"),),
        "columns": (keep_columns(left, torch.arange(8), parse_format("int8-row"))[0],),
    }
    return CompressedWeight((term, *more[rest]))


@pytest.mark.parametrize("rest", ["", "low_rank", "sparse", "factors in codes", "columns", "order"])
@pytest.mark.parametrize("name", ["int4-g32-zero", "int2-g32", "int8-row", "nf4-g32", "mxfp4", "nvfp4"])
def test_products_are_the_references(name: str, rest: str) -> None:
    w = weight(name, rest)
    assert isinstance(choose_kernel(CompressedLayer(w)), Native)
    decoded = w.dequantize().double()
    for shape in ((IN,), (1, IN), (2, 3, IN), (70, IN)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = x.to(dtype)
            y = multiply(given, w)
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], OUT)
            exact = given.double() @ decoded.T
            # A sum of IN products in float32, its terms in any order, and two more roundings a term; then one to x's own type.
            bound = (IN + 4) * 2.0**-24 * (given.double().abs() @ decoded.abs().T) + torch.finfo(dtype).eps * exact.abs()
            if rest in ("low_rank", "factors in codes"):  # two products in a row, the inner vector rounded as the outer sum is
                bound = bound * 3
            assert bool(((y.double() - exact).abs() <= bound).all())


def test_a_layer_is_laid_out_once_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    lay_out = module.lay_out
    monkeypatch.setattr(module, "lay_out", lambda w: made.append(w.shape) or lay_out(w))
    layers = [CompressedLayer(weight()) for _ in range(2)]
    kernels = [Native() for _ in layers]
    for _ in range(3):
        first, second = (kernel.matmul(torch.ones(IN), layer) for kernel, layer in zip(kernels, layers, strict=True))
        assert torch.equal(first, second)
    assert len(made) == 2
    # At the end of the interpreter nothing native is left, whoever still holds the kernels.
    module._forget_all()
    assert torch.equal(kernels[0].matmul(torch.ones(IN), layers[0]), first)
    assert len(made) == 3


def test_rows_beyond_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), torch.randn(11, IN, generator=torch.Generator().manual_seed(3))
    whole = multiply(x, w)
    monkeypatch.setattr(module, "ROWS", 4)
    # Four rows at once take another path than eleven: the sums' order differs.
    assert torch.allclose(multiply(x, w), whole, rtol=1e-5, atol=1e-5)
    assert multiply(x[:0], w).shape == (0, OUT)


def test_x_may_be_any_view() -> None:
    w, x = weight(), torch.randn(IN, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(multiply(x.T, w), multiply(x.T.contiguous(), w))


def test_what_it_leaves_to_the_reference() -> None:
    w = weight()
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(5))
    assert torch.equal(multiply(x.double(), w), Reference().matmul(x.double(), CompressedLayer(w)))
    asked = x.clone().requires_grad_()
    multiply(asked, w).sum().backward()
    assert asked.grad is not None
    assert torch.allclose(asked.grad, w.dequantize().sum(0).expand(2, IN))
    with torch.no_grad():
        assert not multiply(asked, w).requires_grad


def refusal(w: CompressedWeight) -> str:
    return Native.refuses(CompressedLayer(w)) or ""


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    left = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(6))
    term = packed("int4-g32-zero", left)
    assert "meta" in refusal(CompressedWeight((replace(term, tensors={n: t.to("meta") for n, t in term.tensors.items()}),)))
    assert "no layout" in refusal(CompressedWeight((packed("int4-g1", left),)))
    assert "without a layout" in refusal(CompressedWeight((*w.terms, low_rank(left, 2, "int4-g1"))))
    assert refusal(CompressedWeight((*w.terms, low_rank(left, 3, "int8-row")))) == ""
    assert "several" in refusal(CompressedWeight((*w.terms, low_rank(left, 2), low_rank(left, 2))))
    rounded = CompressedLayer(w, ActivationFormat(parse_format("int8-row")))
    assert "int8-row dynamic" in (Native.refuses(rounded) or "")
    assert isinstance(choose_kernel(rounded), Reference)
    stack = CompressedWeight.stack_rows([CompressedWeight((packed("int4-tensor", left),))] * 2)
    assert refusal(stack)
    assert isinstance(choose_kernel(CompressedLayer(stack)), Reference)
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    assert "not there" in refusal(w)
    assert isinstance(choose_kernel(CompressedLayer(w)), Reference)
    assert list(KERNELS) == ["native", "reference"]
