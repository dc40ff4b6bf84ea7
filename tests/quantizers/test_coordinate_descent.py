"""Sweeps of coordinate descent are what a loop over the columns gives."""

import itertools

import pytest
import torch

from bitpress.formats import Format, Params, parse_format
from bitpress.quantizers.mechanisms.coordinate_descent import Descent, prepare_descent

OUT, IN = 12, 48


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return torch.randn(OUT, IN, generator=generator), x.T @ x / 96, torch.randperm(IN, generator=generator)


def visit(
    descent: Descent, w: torch.Tensor, w_hat: torch.Tensor, rounding: tuple[Format, Params] | None, span: int = 1
) -> torch.Tensor:
    """One column (or code) at a time, in float64, from the definition alone."""
    gram, w, now = descent.gram.double(), w.double(), w_hat.double()
    for start in range(0, IN, span):
        at = descent.order[start : start + span]
        own = gram[at][:, at]
        best = now[:, at] + torch.linalg.solve(own, (w - now) @ gram[:, at], left=False)
        if rounding is not None:
            fmt, params = rounding
            near = fmt.columns(params, (OUT, IN), int(at[0]))
            best = fmt.grid.decode(fmt.grid.encode(best.float(), near), near).double()
        now[:, at] = best
    return now.float()


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_a_relaxed_sweep_is_the_loop(damp: float) -> None:
    w, gram, order = case()
    descent = prepare_descent(gram, order, damp=damp)
    start = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(descent.relax(w, start), visit(descent, w, start, None), rtol=1e-4, atol=1e-4)


def test_a_relaxed_sweep_over_pairs_is_the_loop_over_pairs() -> None:
    w, gram, _ = case(1)
    order = (torch.randperm(IN // 2, generator=torch.Generator().manual_seed(1))[:, None] * 2 + torch.arange(2)).reshape(-1)
    descent = prepare_descent(gram, order, span=2)
    # The ridge of 1e-4 on a pair's block is not in the loop.
    torch.testing.assert_close(descent.relax(w, w * 0.5), visit(descent, w, w * 0.5, None, span=2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["int3-g16-zero", "int2-row", "nf4-g16", "int4-2x16-zero"])
def test_a_rounding_sweep_is_the_loop(name: str) -> None:
    w, gram, order = case(2)
    fmt = parse_format(name)
    params = fmt.fit(w)
    descent = prepare_descent(gram, order)
    for start in (w, fmt.decode(fmt.encode(w, params), params)):
        ours = fmt.decode(descent.sweep(w, start, fmt, params), params)
        torch.testing.assert_close(ours, visit(descent, w, start, (fmt, params)))


@pytest.mark.parametrize("name", ["int3-g16-zero", "nf3-row"])
def test_no_sweep_from_a_rounded_weight_makes_a_row_worse(name: str) -> None:
    w, gram, order = case(3)
    fmt = parse_format(name)
    params = fmt.fit(w)
    descent = prepare_descent(gram, order)
    w_hat = fmt.decode(fmt.encode(w, params), params)
    errors = [descent.errors(w - w_hat)]
    for _ in range(4):
        w_hat = fmt.decode(descent.sweep(w, w_hat, fmt, params), params)
        errors.append(descent.errors(w - w_hat))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert (errors[-1] < errors[0]).all()


def test_errors_are_those_of_the_output() -> None:
    w, gram, order = case(4)
    descent = prepare_descent(gram, order)
    expected = torch.einsum("oi,ij,oj->o", w.double(), gram.double(), w.double()) / gram.diagonal().double().mean()
    torch.testing.assert_close(descent.errors(w).double(), expected, rtol=1e-4, atol=0.0)


def test_damping_is_a_part_of_the_mean_diagonal() -> None:
    _, gram, order = case(6)
    expected = gram / gram.diagonal().mean() + 0.25 * torch.eye(IN)
    torch.testing.assert_close(prepare_descent(gram, order, damp=0.25).gram, expected)


def test_a_dead_channel_is_rounded_plainly() -> None:
    w, gram, order = case(5)
    alive = (torch.arange(IN) != 7).float()
    descent = prepare_descent(gram * alive * alive[:, None], order)
    fmt = parse_format("int3-g16")
    params = fmt.fit(w)
    codes = descent.sweep(w, w, fmt, params)
    assert torch.equal(codes[:, 7], fmt.encode(w, params)[:, 7])
