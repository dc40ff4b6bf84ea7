"""Capture recognises products by the address of the weight, in every spelling that models use."""

from collections.abc import Callable

import pytest
import torch

from bitpress.calibration import Capture, Observed
from bitpress.errors import CalibrationError, NumericsError

OUT, IN, TOKENS = 3, 5, 7


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def expected(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows / len(rows)


SPELLINGS: dict[str, tuple[bool, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "linear": (True, lambda x, w: torch.nn.functional.linear(x, w)),
    "linear by name": (True, lambda x, w: torch.nn.functional.linear(input=x, weight=w)),
    "x @ w.T": (True, lambda x, w: x @ w.T),
    "x @ w": (False, lambda x, w: x @ w),
    "mm": (False, lambda x, w: torch.mm(x, w)),
    "matmul": (False, lambda x, w: torch.matmul(x, w)),
    "method": (False, lambda x, w: x.matmul(w)),
    "addmm": (False, lambda x, w: torch.addmm(torch.zeros(OUT), x, w)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_seen(spelling: str) -> None:
    out_first, product = SPELLINGS[spelling]
    x, w = draw(TOKENS, IN), draw(OUT, IN) if out_first else draw(IN, OUT)
    with Capture([Observed("w", w, out_first)], {"gram"}) as capture:
        y = product(x, w)
    assert torch.equal(y, product(x, w))
    stats = capture.finish()["w"]
    assert stats.tokens == TOKENS
    torch.testing.assert_close(stats.gram, expected(x))


def test_modules_with_one_input_share_statistics() -> None:
    q, k, o = (torch.nn.Linear(IN, IN, bias=False) for _ in range(3))
    x = draw(2, TOKENS, IN)
    with torch.no_grad(), Capture([Observed(n, m.weight) for n, m in (("q", q), ("k", k), ("o", o))], {"gram"}) as capture:
        for _ in range(3):
            o(q(x) + k(x))
            capture.next_batch()
    assert capture.groups() == [["q", "k"], ["o"]]
    stats = capture.finish()
    assert stats["q"] is stats["k"]
    assert stats["q"].tokens == 3 * 2 * TOKENS
    assert stats["o"].tokens == 3 * 2 * TOKENS
    torch.testing.assert_close(stats["q"].gram, expected(x))
    with torch.no_grad():
        torch.testing.assert_close(stats["o"].gram, expected(q(x) + k(x)))


def test_changed_input_is_another_input() -> None:
    a, b = draw(OUT, IN), draw(OUT, IN)
    x = draw(TOKENS, IN)
    with Capture([Observed("a", a), Observed("b", b)], {"mean_abs"}) as capture:
        torch.nn.functional.linear(x, a)
        x.mul_(2)  # the same memory
        torch.nn.functional.linear(x, b)
    stats = capture.finish()
    assert capture.groups() == [["a"], ["b"]]
    torch.testing.assert_close(stats["b"].mean_abs, x.abs().mean(0))
    torch.testing.assert_close(stats["a"].mean_abs, x.abs().mean(0) / 2)


def test_experts_are_slices_of_one_parameter() -> None:
    experts = draw(4, IN, OUT)
    observed = [Observed(f"e{i}", experts[i], out_first=False) for i in range(4)]
    x = draw(4, TOKENS, IN)
    with Capture(observed, {"gram"}) as capture:
        torch.bmm(x, experts)
        torch.mm(x[2], experts[2])
    stats = capture.finish()
    assert {name: s.tokens for name, s in stats.items()} == {"e0": TOKENS, "e1": TOKENS, "e2": TOKENS, "e3": TOKENS}
    for i in range(4):
        torch.testing.assert_close(stats[f"e{i}"].gram, expected(x[i]))


@pytest.mark.parametrize(
    "product",
    [torch.bmm, torch.Tensor.bmm, lambda x, w: torch.baddbmm(torch.zeros(OUT), x, w), lambda x, w: x.baddbmm(x, w)],
    ids=["bmm", "method", "baddbmm", "baddbmm of a tensor"],
)
def test_a_batched_product_counts_the_tokens_that_were_routed_to_an_expert(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    experts = draw(3, OUT, OUT)
    x = draw(3, TOKENS, OUT)
    x[1, 2:] = 0  # tokens that went elsewhere
    x[2] = 0
    with Capture([Observed(f"e{i}", experts[i], out_first=False, expert=True) for i in range(3)], {"gram"}) as capture:
        product(x, experts)
    stats = capture.finish()
    assert {name: s.tokens for name, s in stats.items()} == {"e0": TOKENS, "e1": 2}
    torch.testing.assert_close(stats["e1"].gram, expected(x[1, :2]))


def test_unused_and_unwatched_weights() -> None:
    a, b, c = draw(OUT, IN), draw(OUT, IN), draw(OUT, IN)
    with Capture([Observed("a", a), Observed("b", b)], {"gram"}) as capture:
        torch.nn.functional.linear(draw(TOKENS, IN), a)
        torch.nn.functional.linear(draw(TOKENS, IN), c)
        torch.nn.functional.linear(draw(0, IN), b)  # an expert that no token reached
    torch.nn.functional.linear(draw(TOKENS, IN), b)  # after the capture
    assert list(capture.finish()) == ["a"]


def test_wrong_orientation_is_refused() -> None:
    w = draw(IN, IN)
    with pytest.raises(CalibrationError, match=r"w: .*transposed"), Capture([Observed("w", w)], {"gram"}):
        _ = draw(TOKENS, IN) @ w


def test_sick_input_names_the_weight() -> None:
    w = draw(OUT, IN)
    with pytest.raises(NumericsError, match=r"layers\.0\.up"), Capture([Observed("layers.0.up", w)], {"gram"}):
        torch.nn.functional.linear(torch.full((2, IN), torch.nan), w)


@pytest.mark.parametrize("expert", [False, True])
def test_a_forward_is_left_after_its_last_product_but_never_with_experts(expert: bool) -> None:
    a, b, x = draw(IN, IN), draw(IN, IN), draw(TOKENS, IN)
    ends = []

    def forward() -> torch.Tensor:
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, a) + x, b)
        y = torch.nn.functional.linear(y, a)  # again: the last product is this one
        ends.append(True)
        return y

    capture = Capture([Observed("a", a, expert=expert), Observed("b", b)], {"gram"})
    outs = [capture.run(forward, whole=whole) for whole in (False, False, True)]
    assert [out is None for out in outs] == [False, not expert, False]
    assert len(ends) == (3 if expert else 2)
    stats = capture.finish()
    assert stats["a"].tokens == 3 * 2 * TOKENS
    assert stats["b"].tokens == 3 * TOKENS
    original = Capture([Observed("a", a), Observed("b", b)], {"gram", "cross"})
    for _ in range(2):
        original.run(forward, whole=False, original=True)
        original.run(forward, whole=False)
    assert not original.finish()["b"].need("cross", "test").any()
