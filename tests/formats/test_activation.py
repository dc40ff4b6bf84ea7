"""Formats of inputs: a token is rounded as it would be alone, stored parameters serve all, and a bad specification is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import ActivationFormat, CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.formats.maps.map import Permutation
from bitpress.formats.terms.low_rank import low_rank
from bitpress.kernels.reference import Reference

OUT, IN = 12, 64
DYNAMIC = ("int8-row", "int4-g16-zero", "e4m3-g32-e8m0", "nf4-g16-bf16", "e2m1-g16-s4")
LOCAL = ("e2m1-g16-fp8", "e2m1-g16-fp8over", "int4-g32-zero-fp8")
STATIC = ("int8-tensor", "int8-tensor-zero", "e4m3-tensor-fp32", "int4-tensor-fp8")


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1))


def made(name: str) -> ActivationFormat:
    fmt = parse_format(name)
    if name in LOCAL:
        return ActivationFormat.local(fmt, fmt.fit(inputs(100)))
    return ActivationFormat.static(fmt, fmt.fit(inputs(100))) if "tensor" in name else ActivationFormat(fmt)


def layer(name: str) -> CompressedLayer:
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    fmt = parse_format("int4-g16")
    params = fmt.fit(w)
    terms = (Packed.pack(fmt, fmt.encode(w, params), params), low_rank(w, 2))
    return CompressedLayer(CompressedWeight(terms, Permutation(torch.arange(IN).flip(0).to(torch.int32))), made(name))


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_token_is_rounded_as_it_would_be_alone(name: str) -> None:
    x, fmt = inputs(2, 5), parse_format(name)
    rounded = made(name).round(x)
    for token, got in zip(x.reshape(-1, IN), rounded.reshape(-1, IN), strict=True):
        params = fmt.fit(token[None])
        assert torch.equal(got, fmt.decode(fmt.encode(token[None], params), params)[0])
    assert not torch.equal(rounded, x)
    assert made(name).round(x[:0]).shape == (0, 5, IN)


@pytest.mark.parametrize("name", STATIC)
def test_stored_parameters_serve_any_number_of_tokens(name: str) -> None:
    fmt, sample, x = parse_format(name), inputs(100), inputs(3, 7) * 2
    params = fmt.fit(sample)
    flat = x.reshape(-1, IN)
    assert torch.equal(made(name).round(x), fmt.decode(fmt.encode(flat, params), params).reshape(x.shape))


@pytest.mark.parametrize("name", LOCAL)
def test_local_scales_are_those_of_a_token_under_the_stored_one(name: str) -> None:
    local, x = made(name), inputs(2, 5)
    x[0, 0] = 0.0
    alone = torch.stack([local.round(token[None])[0] for token in x.reshape(-1, IN)]).reshape(x.shape)
    assert torch.equal(local.round(x), alone)
    # The stored scale is that of the sample: a token that is smaller has smaller scales, to the step of an E4M3.
    fmt = parse_format(name)
    assert torch.equal(local.round(inputs(100)), fmt.decode(fmt.encode(inputs(100), fit := fmt.fit(inputs(100))), fit))
    error = float((local.round(x / 16) - x / 16).norm() / (x / 16).norm())
    assert error == pytest.approx(float((local.round(x) - x).norm() / x.norm()), rel=0.2)
    assert float(local.round(x * 1000).abs().max()) < 4 * float(local.round(inputs(100)).abs().max())  # beyond the range


@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC, *LOCAL])
def test_a_layer_is_its_specifications_and_tensors(name: str) -> None:
    whole, x = layer(name), inputs(3)
    spec, input_spec = whole.weight.spec(), whole.input_spec()
    expected = CompressedLayer.expected(spec, input_spec)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in whole.tensors().items()} == expected
    again = CompressedLayer.build(spec, whole.tensors(), input_spec)
    assert again.input_spec() == input_spec
    assert (set(again.tensors()) > set(whole.weight.tensors())) == (name in (*STATIC, *LOCAL))
    y = Reference().matmul(x, again)
    assert torch.equal(y, Reference().matmul(x, whole))
    # The input is rounded behind the input map, and every term sees it rounded.
    assert whole.input is not None
    seen = whole.input.round(x.flip(-1)).double()
    exact = seen @ sum(term.dequantize().double() for term in whole.weight.terms).T
    # Two sums of IN products in float32, and their sum.
    bound = (IN + 2) * 2.0**-24 * (seen.abs() @ sum(t.dequantize().double().abs() for t in whole.weight.terms).T)
    assert bool(((y - exact).abs() <= bound).all())
    without = Reference().matmul(x, CompressedLayer(whole.weight))
    assert not torch.allclose(y, without, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"format": "int8-row"}, FormatError, "no more and no less"),
        ({"format": "int8-row", "parameters": "dynamic", "bits": "8"}, FormatError, "no more and no less"),
        ({"format": "int8-row", "parameters": 1}, FormatError, "by names"),
        ({"format": "int8-row", "parameters": "dynamical"}, UsageError, "dynamic"),
        ({"format": "int8-tensor", "parameters": "dynamic"}, FormatError, "one token|tokens would share"),
        ({"format": "e2m1-g16-fp8", "parameters": "dynamic"}, FormatError, "tokens would share"),
        ({"format": "int8-row", "parameters": "static"}, FormatError, "the block tensor"),
        ({"format": "int8-row", "parameters": "local"}, FormatError, "no scale of the whole tensor"),
        ({"format": "int4-g16-dq", "parameters": "local"}, FormatError, "no scale of the whole tensor"),
        ({"format": "e2m1-tensor-fp8", "parameters": "local"}, FormatError, "no scale of the whole tensor"),
        ({"format": "int9000-row", "parameters": "dynamic"}, (FormatError, UsageError), "int9000"),
        ({"format": "int8-g48", "parameters": "dynamic"}, FormatError, "not a multiple of 48"),
    ],
)
def test_a_bad_specification_is_refused(spec: Mapping[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        CompressedLayer.expected(layer("int8-row").weight.spec(), spec)


def test_tensors_that_are_not_the_inputs_are_refused() -> None:
    local = layer("e2m1-g16-fp8over")
    for wrong in (float("inf"), 0.0):
        changed = {**local.tensors(), "input.scale_tensor": torch.full((1,), wrong)}
        with pytest.raises(FormatError, match="the input's scale_tensor"):
            CompressedLayer.build(local.weight.spec(), changed, local.input_spec())
    whole = layer("int8-tensor")
    spec, tensors = whole.weight.spec(), whole.tensors()
    for changed in (
        whole.weight.tensors(),
        {**tensors, "input.scale": tensors["input.scale"].double()},
        {**tensors, "input.zero": torch.zeros(1)},
        {**tensors, "input.scale": torch.full((1, 1), float("nan"), dtype=tensors["input.scale"].dtype)},
    ):
        with pytest.raises(FormatError, match="input"):
            CompressedLayer.build(spec, changed, whole.input_spec())
    with pytest.raises(FormatError, match="input"):
        CompressedLayer.build(spec, tensors)
    with pytest.raises(FormatError, match="not a multiple of 48"):
        CompressedLayer(whole.weight, ActivationFormat(parse_format("int8-g48")))
    with pytest.raises(NumericsError):
        made("int8-row").round(torch.full((1, IN), float("nan")))
