"""SpQR: what is an outlier, what it is taken for, and what its error is not fed to."""

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, FormatError, UsageError
from bitpress.formats import Packed, Permutation, Sparse, parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mechanisms.error_feedback import prepare
from bitpress.quantizers.mechanisms.outliers import without
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import shrink_ratios
from bitpress.quantizers.spqr import SpQR, leave_one_out

OUT, IN = 24, 64


def layer(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    x = x * torch.exp(torch.randn(IN, generator=generator))
    w = torch.randn(OUT, IN, generator=generator)
    return w * torch.exp(0.7 * torch.randn(OUT, IN, generator=generator)), Stats(400, x.T @ x / 400)


def test_the_cost_is_the_loss_that_later_columns_cannot_make_up_for() -> None:
    _, stats = layer()
    gram = stats.need_gram("test").double()
    feedback = prepare(stats.need_gram("test"), "activation", 1, 0.01, 10.0)
    cost = feedback.cost()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(IN)
    for place in (0, 1, 30, IN - 1):
        column, later = int(feedback.order[place]), feedback.order[place + 1 :]
        # An error of 1 in the column, the columns behind it free: what is left of its loss is a Schur complement.
        own = h[column, column]
        if len(later):
            own = own - h[column, later] @ torch.linalg.solve(h[later][:, later], h[later, column])
        assert float(cost[column]) == pytest.approx(float(own), rel=1e-3)  # float32 of a factor of condition 1e4


@pytest.mark.parametrize("name", ["int3-g16", "int2-g16-zero", "int3-row-zero", "nf3-g32"])
def test_leaving_each_weight_out_in_turn(name: str) -> None:
    fmt, w = parse_format(name), layer(1)[0][:6]
    cost = torch.rand(IN) + 0.1
    size = fmt.block.resolve((len(w), IN))[1]
    params = fmt.fit(w)
    expected = torch.empty(len(w), IN)
    for row in range(len(w)):
        for start in range(0, IN, size):
            group, weight = w[row, start : start + size], cost[start : start + size]

            def error(values: torch.Tensor, weight: torch.Tensor, name: str = name) -> float:
                alone = parse_format(f"{name.split('-')[0]}-row" + ("-zero" if "zero" in name else ""))
                own = alone.fit(values[None])
                return float(((alone.decode(alone.encode(values[None], own), own)[0] - values).square() * weight).sum())

            for j in range(size):
                others = torch.arange(size) != j
                expected[row, start + j] = error(group, weight) - error(group[others], weight[others])
    got = leave_one_out(w, cost, fmt)
    # Sums of up to 64 float32 squares of up to 5, taken from each other; where an end helps less than itself, itself counts.
    own = (fmt.decode(fmt.encode(w, params), params) - w).square() * cost
    torch.testing.assert_close(got, torch.maximum(expected, own), rtol=0, atol=2e-4)
    assert (expected > own + 1e-2).any()


@pytest.mark.parametrize("name", ["int3-g16", "int2-g16-zero-s4", "int3-2x16"])
def test_columns_in_turn_with_nothing_of_an_outlier_fed_back(name: str) -> None:
    fmt, (w, stats) = parse_format(name), layer(2)
    outcome = SpQR(order="natural", most=0.02).quantize(w, stats, fmt)
    packed, outliers = outcome.weight.terms
    assert isinstance(packed, Packed)
    assert isinstance(outliers, Sparse)
    codes, params = packed.unpack()
    kept = outliers.dequantize()
    assert 0 < outliers.count < 0.1 * w.numel()
    h = stats.need_gram("test").double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(IN)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    open_, same = w.double().clone(), 0
    smallest, largest = float("inf"), 0.0
    for j in range(IN):
        here = fmt.columns(params, (OUT, IN), j)
        q = fmt.grid.decode(codes[:, j : j + 1], here)[:, 0].double()
        same += int((fmt.grid.encode(open_[:, j : j + 1].float(), here)[:, 0] == codes[:, j]).sum())
        error = open_[:, j] - q
        cost = error.square() / upper[j, j].square()
        chosen = kept[:, j] != 0
        torch.testing.assert_close(kept[chosen, j].double(), error[chosen], rtol=1e-2, atol=1e-3)
        smallest = min([smallest, *cost[chosen].tolist()])
        largest = max([largest, *cost[~chosen].tolist()])
        error = error - kept[:, j].double()
        open_[:, j + 1 :] -= error[:, None] / upper[j, j] * upper[j, j + 1 :]
    # The quantizer works in float32: a weight half-way between two levels may fall to either.
    assert same >= 0.995 * w.numel()
    assert largest <= smallest * 1.01


def test_planted_outliers_are_found_and_no_longer_widen_their_groups() -> None:
    w = layer(3)[0].clamp(-1, 1)
    stats = Stats(400, torch.eye(IN) + 0.3)
    at = (torch.arange(8) * 3, torch.arange(8) * 7)
    w[at] = 40.0
    fmt = parse_format("int3-g16")
    outcome = SpQR(most=0.01).quantize(w, stats, fmt)
    kept = outcome.weight.terms[1].dequantize()
    assert (kept[at] != 0).all()
    assert output_error(w, outcome.weight.dequantize(), stats) < 0.2 * output_error(
        w, GPTQ().quantize(w, stats, fmt).weight.dequantize(), stats
    )


def test_the_threshold_rules_where_it_asks_for_fewer() -> None:
    w, stats = layer(4)
    fmt = parse_format("int4-g16")
    counts = [SpQR(threshold=t, most=0.5).quantize(w, stats, fmt).figures["outliers"] for t in (0.003, 0.03, 0.3, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0.05
    assert counts[-1] == 0


def test_rows_in_another_order_get_the_same_codes() -> None:
    w, stats = layer(5)
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(0))
    fmt = parse_format("int3-g16-zero")
    one = SpQR().quantize(w, stats, fmt).weight.dequantize()
    other = SpQR().quantize(w[order], stats, fmt).weight.dequantize()
    assert torch.equal(one[order], other)


def test_a_gram_that_cannot_be_factored_still_has_outliers() -> None:
    w, stats = layer(6)
    hopeless = Stats(400, -torch.ones(IN, IN) * 1e3 + 1001 * torch.eye(IN))
    outcome = SpQR(damp_limit=1.0).quantize(w, hopeless, parse_format("int3-g16"))
    assert "rounded without error feedback" in outcome.fallbacks[0]
    assert outcome.figures["outliers"] > 0
    assert stats.tokens == 400


def test_what_is_wrong_is_said() -> None:
    w, stats = layer()
    for nothing in (None, Stats(0), Stats(400)):
        with pytest.raises(CalibrationError, match="spqr"):
            SpQR().quantize(w, nothing, parse_format("int3-g16"))
    with pytest.raises(FormatError, match="not a multiple"):
        SpQR().quantize(w, stats, parse_format("int3-g48"))
    for wrong in ({"threshold": 0.0}, {"most": 1.0}, {"damp": 0.0}, {"order": "random"}):
        with pytest.raises(UsageError):
            SpQR(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["int3-g16-zero", "int2-g8-zero-s4"])
def test_a_running_group_is_fitted_without_the_weights_that_leaving_out_marks(name: str) -> None:
    fmt, (w, stats) = parse_format(name), layer(7)
    method = SpQR()
    outcome = method.quantize(w, stats, fmt)
    packed, outliers = outcome.weight.terms
    assert isinstance(packed, Packed)
    assert isinstance(outcome.weight.input_map, Permutation)
    order = outcome.weight.input_map.order.long()
    codes, params = packed.unpack()
    params = {**params, **({"scale_row": packed.tensors["scale_row"][:, None]} if "s4" in name else {})}
    h = stats.need_gram("test").double()[order][:, order]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(IN)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    cost = upper.diagonal().square().reciprocal().float()
    open_, kept, cols = w[:, order].double(), outliers.dequantize(), fmt.block.resolve((OUT, IN))[1]
    limit = method.limit(leave_one_out(w[:, order], cost, fmt), w[:, order], cost)
    alone = parse_format("-".join(name.split("-")[:3]))
    same = 0
    for start in range(0, IN, cols):
        here = slice(start, start + cols)
        group = open_[:, here].float()
        apart = leave_one_out(group, cost[here], alone) > limit
        values = without(group, apart, alone)
        fitted = fmt.refit(params, (OUT, IN), start, values, cost[here] * ~apart, shrink_ratios("mse", 20, 0.5))
        across = start // cols
        same += int((fitted["scale"][:, across] == params["scale"][:, across]).sum())
        w_hat = fmt.decode(codes, params)[:, here].double() + kept[:, here]
        for j in range(start, start + cols):
            error = open_[:, j] - w_hat[:, j - start]
            open_[:, j + 1 :] -= error[:, None] / upper[j, j] * upper[j, j + 1 :]
    # Two ranges of a search may be equally good to float32.
    assert same >= 0.95 * OUT * IN // cols


def test_the_limit_is_raised_only_where_the_bound_is_passed() -> None:
    w, stats = layer(8)
    fmt = parse_format("int3-g16-zero")
    shares = [SpQR(most=most).quantize(w, stats, fmt).figures["outliers"] for most in (0.001, 0.01, 0.5, 0.9)]
    assert shares[0] < shares[1] < shares[2] == shares[3]
    assert SpQR(groups="static").keeps_map is False
