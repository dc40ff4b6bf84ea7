"""Fake quantization: forward is the format, backward is a clamp's."""

import pytest
import torch

from bitpress.errors import FormatError, NumericsError
from bitpress.formats import GRIDS, Streamed, parse_format
from bitpress.formats.fake_quantize import fake_quantize

PLAIN = [row.in_block("g16") for row in GRIDS.values()]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PLAIN)
def test_forward_is_decode_of_encode_and_backward_a_mask(name: str) -> None:
    fmt = parse_format(name)
    x = tokens(2, 4, 32)
    flat = x.reshape(8, 32)
    params = fmt.fit(flat)
    expected = fmt.decode(fmt.encode(flat, params), params).reshape(x.shape)
    assert torch.equal(fake_quantize(x, fmt), expected)
    x.requires_grad_(True)
    y = fake_quantize(x, fmt, params)
    assert torch.equal(y.detach(), expected)
    upstream = tokens(2, 4, 32, seed=1)
    y.backward(upstream)
    assert x.grad is not None
    passed = x.grad == upstream
    assert torch.all(passed | (x.grad == 0))
    assert passed.float().mean() > 0.6
    if fmt.grid.span > 1:
        assert passed.all()
    else:
        # What is clipped moves toward zero, or at least not past where it was.
        clipped = ~passed
        assert torch.all((expected[clipped] - x.detach()[clipped]).sign() != x.detach()[clipped].sign())


@pytest.mark.parametrize(
    "name", [name for name in PLAIN if parse_format(name).grid.span == 1 and not isinstance(parse_format(name).grid, Streamed)]
)
def test_what_lies_far_outside_gets_no_gradient(name: str) -> None:
    fmt = parse_format(name)
    x = tokens(4, 32)
    params = fmt.fit(x)
    far = x.mul(1e4).requires_grad_(True)
    fake_quantize(far, fmt, params).sum().backward()
    assert far.grad is not None
    # Blocks reach no further than a few thousand times their own weights: not even a grid that spreads unevenly.
    assert far.grad[x.abs() > 0.5].sum() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_the_gradient_of_integers_is_that_of_torch(bits: int, zero: bool) -> None:
    fmt = parse_format(f"int{bits}-row{'-zero' if zero else ''}-fp32")
    x = tokens(5, 64, seed=bits)
    params = {name: t * 0.4 if name == "scale" else t for name, t in fmt.fit(x).items()}
    middle = params["zero"].flatten() if zero else torch.full((5,), float(1 << (bits - 1)))
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y = fake_quantize(ours, fmt, params)
    reference = torch.fake_quantize_per_channel_affine(theirs, params["scale"].flatten(), middle.int(), 0, 0, (1 << bits) - 1)
    y.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(y, reference, rtol=1e-6, atol=1e-6)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert 0.1 < float((ours.grad == 0).float().mean()) < 0.9


def test_the_gradient_is_that_of_a_clamp_to_half_a_step_beyond_the_levels() -> None:
    fmt = parse_format("e2m1-g16-fp32")
    x = tokens(4, 64, seed=3)
    params = {"scale": fmt.fit(x)["scale"] * 0.5}
    # The last step of e2m1 is from 4 to 6.
    bound = (7.0 * params["scale"]).repeat_interleave(16, 1)
    ours, clamped = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    loss = tokens(4, 64, seed=4)
    (fake_quantize(ours, fmt, params) * loss).sum().backward()
    (torch.maximum(torch.minimum(clamped, bound), -bound) * loss).sum().backward()
    assert ours.grad is not None
    assert clamped.grad is not None
    assert torch.equal(ours.grad, clamped.grad)
    assert (ours.grad == 0).any()


@pytest.mark.parametrize("name", ["int8-row", "int4-g16-zero", "e4m3-row", "nf4-g16", "mxfp4-g32-e8m0", "dint4-g16-zero"])
def test_a_dynamic_scale_that_clips_nothing_passes_every_gradient(name: str) -> None:
    fmt = parse_format(name)
    x = tokens(3, 64, seed=5).requires_grad_(True)
    fake_quantize(x, fmt).sum().backward()
    assert x.grad is not None
    # OCP's scale clips what lies more than half a step beyond the largest level: between 7 and 8 times the scale.
    assert x.grad.mean() == 1 if name != "mxfp4-g32-e8m0" else x.grad.mean() > 0.9


def test_every_token_is_fitted_apart_and_a_given_scale_serves_all() -> None:
    fmt = parse_format("int8-row")
    x = tokens(2, 3, 32)
    alone = torch.stack([torch.stack([fake_quantize(token, fmt) for token in batch]) for batch in x])
    assert torch.equal(fake_quantize(x, fmt), alone)
    static = parse_format("int8-tensor")
    params = static.fit(tokens(16, 32, seed=9))
    assert torch.equal(fake_quantize(x[0], static, params), fake_quantize(x, static, params)[0])


def test_the_type_stays_and_second_gradients_are_those_of_the_mask() -> None:
    fmt = parse_format("int4-g16")
    x = tokens(2, 32).bfloat16().requires_grad_(True)
    y = fake_quantize(x, fmt)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    flat = x.detach().float()
    params = fmt.fit(flat)
    assert torch.equal(y.detach(), fmt.decode(fmt.encode(flat, params), params).bfloat16())


def test_training_through_it_reaches_the_grid() -> None:
    fmt = parse_format("int4-row-fp32")
    target = tokens(4, 16, seed=6)
    x = torch.zeros(4, 16).requires_grad_(True)
    params = fmt.fit(target)
    best = float((fmt.decode(fmt.encode(target, params), params) - target).square().mean())
    for _ in range(200):
        loss = (fake_quantize(x, fmt, params) - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= 2.0 * gradient
    assert loss.item() < 4 * best + 1e-6


def test_empty_and_sick_tensors() -> None:
    fmt = parse_format("int8-row")
    assert fake_quantize(torch.zeros(0, 32), fmt).shape == (0, 32)
    params = parse_format("int8-tensor").fit(tokens(2, 8))
    for given in (None, params):
        with pytest.raises(NumericsError, match="NaN or an infinity"):
            fake_quantize(torch.tensor([[1.0, torch.nan]]), parse_format("int8-tensor"), given)
    with pytest.raises(FormatError, match="no columns"):
        fake_quantize(torch.tensor(1.0), fmt)
    with pytest.raises(FormatError, match="not a multiple of 16"):
        fake_quantize(torch.zeros(2, 24), parse_format("int8-g16"))
