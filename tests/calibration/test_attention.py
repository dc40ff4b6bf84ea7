"""Statistics of attention, against the errors that they stand for, computed outright."""

from typing import Any

import pytest
import torch

from bitpress.calibration import Capture, Observed, attention, find_roles
from bitpress.calibration import stats as stats_module
from bitpress.calibration.attention import MOST, Attention, token_weights
from bitpress.errors import CalibrationError, NumericsError

TOKENS, ROW = 12, 4


@pytest.fixture(autouse=True, params=["at once", "five rows after others"])
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "at once":
        monkeypatch.setattr(attention, "_TOGETHER", 5 * 2 * TOKENS)  # of two heads
        monkeypatch.setattr(stats_module, "TILE", 4)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(torch.nn.Module):
    """Attention without positions, as small as it gets; several heads may share a key head."""

    def __init__(self, heads: int = 2, key_heads: int = 2, width: int = 6) -> None:
        super().__init__()
        sizes = {
            "q": (heads * ROW, width),
            "k": (key_heads * ROW, width),
            "v": (key_heads * ROW, width),
            "o": (width, heads * ROW),
        }
        for i, (name, shape) in enumerate(sizes.items()):
            setattr(self, name, torch.nn.Parameter(draw(*shape, seed=i + 1), requires_grad=False))
        self.up = torch.nn.Parameter(draw(5, width, seed=9), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        q, k, v = (linear(x, w).unflatten(-1, (-1, ROW)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return linear(linear(mixed.transpose(1, 2).flatten(2), self.o), self.up)

    def observed(self) -> list[Observed]:
        return [Observed(name, getattr(self, name).data) for name in ("q", "k", "v", "o", "up")]


def measure(block: Block, x: torch.Tensor, needs: set[str]) -> Any:
    observed = block.observed()
    capture = Capture(observed, needs, find_roles(lambda: block(x[:1]), observed))
    for text in x.split(1):
        with capture:
            block(text)
        capture.next_batch()
    return capture.finish()


def test_roles_are_found_by_what_moves() -> None:
    block = Block(heads=4)
    roles = find_roles(lambda: block(draw(1, TOKENS, 6)), block.observed())
    assert {role: w.name for role, w in roles.items()} == {"query": "q", "key": "k", "value": "v", "output": "o"}


def test_a_fused_projection_has_no_role() -> None:
    fused = draw(3 * ROW, 6)

    def run() -> torch.Tensor:
        q, k, v = torch.nn.functional.linear(draw(1, TOKENS, 6), fused).unflatten(-1, (3, 1, ROW)).transpose(1, 3).unbind(2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert find_roles(run, [Observed("qkv", fused)]) == {}


@pytest.mark.parametrize("name", ["q", "k"])
def test_row_gram_is_the_error_of_the_scores(name: str) -> None:
    """sum over heads of tr(R d G d') is the squared change of q'k over all pairs of tokens; exact for one text."""
    block, x = Block(), draw(1, TOKENS, 6)
    stats = measure(block, x, {"gram", "row_gram"})[name]

    def scores() -> torch.Tensor:
        q, k = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, ROW)).transpose(1, 2) for w in (block.q, block.k))
        return q @ k.mT

    before, change = scores(), draw(*getattr(block, name).shape, seed=7)
    getattr(block, name).data += change
    direct = (scores() - before).square().sum()
    parts = change.unflatten(0, (-1, ROW))
    ours = ((stats.row_gram @ parts @ stats.gram) * parts).sum() * TOKENS**2
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=0)


@pytest.mark.parametrize("head", [0, 1])
def test_grams_of_a_value_head_are_the_error_of_the_output(head: int) -> None:
    block, x = Block(), draw(3, TOKENS, 6)
    stats = measure(block, x, {"gram", "row_gram", "head_gram"})["v"]
    taken = block.up.clone()
    block.up = torch.nn.Parameter(torch.eye(6), requires_grad=False)
    before, change = block(x), draw(ROW, 6, seed=7)
    block.v.data[head * ROW : (head + 1) * ROW] += change
    direct = (block(x) - before).square().sum() / (3 * TOKENS)
    ours = ((stats.row_gram[head] @ change @ stats.head_gram[head]) * change).sum()
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=0)
    assert taken.shape == (5, 6)


def test_heads_that_share_keys_are_summed() -> None:
    block, x = Block(heads=4), draw(2, TOKENS, 6)
    stats = measure(block, x, {"gram", "row_gram", "head_gram"})
    assert {n: tuple(s.row_gram.shape) for n, s in stats.items() if s.row_gram is not None} == {
        "q": (4, ROW, ROW),
        "k": (2, ROW, ROW),
        "v": (2, ROW, ROW),
    }
    q = torch.nn.functional.linear(x, block.q).unflatten(-1, (4, ROW))
    torch.testing.assert_close(
        stats["k"].row_gram[0], sum(q[:, :, h].flatten(0, 1).T @ q[:, :, h].flatten(0, 1) for h in (0, 1)) / 24
    )
    o = block.o.unflatten(1, (4, ROW))
    torch.testing.assert_close(stats["v"].row_gram[1], o[:, 2].T @ o[:, 2] + o[:, 3].T @ o[:, 3])
    assert stats["q"].head_gram is None
    products = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, ROW)).transpose(1, 2) for w in (block.q, block.k))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        *products, x[:, None].expand(-1, 2, -1, -1), is_causal=True, enable_gqa=True
    )
    shared = mixed.transpose(0, 1)[2:].flatten(0, 2)  # what the two heads of the second key head make of the inputs
    torch.testing.assert_close(stats["v"].head_gram[1], shared.T @ shared / 24)
    assert stats["o"].row_gram is None
    assert stats["up"].row_gram is None


@pytest.mark.parametrize("keys", [TOKENS - 3, TOKENS, TOKENS + 3])
@pytest.mark.parametrize("kind", ["causal", "bool mask", "float mask", "free"])
def test_scores_are_those_of_torch(kind: str, keys: int) -> None:
    q, k, v = draw(2, 4, TOKENS, ROW), draw(2, 2, keys, ROW, seed=1), draw(2, 2, keys, ROW, seed=2)
    allowed = (draw(2, 1, TOKENS, keys, seed=3) > 0) | torch.eye(TOKENS, keys, dtype=torch.bool)
    allowed[..., 0] = True
    mask = {"bool mask": allowed, "float mask": torch.where(allowed, draw(TOKENS, keys), -torch.inf)}.get(kind)
    kwargs = {"attn_mask": mask, "is_causal": kind == "causal", "scale": 0.3, "enable_gqa": True}
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, **kwargs)
    seen = Attention.of((q, k, v), kwargs)
    for sample in range(2):
        values = v[sample].repeat_interleave(2, 0)
        found = [scores @ values[:, : scores.shape[-1]] for scores in seen.scores(sample)]
        torch.testing.assert_close(torch.cat(found, 1), wanted[sample])


def test_a_row_that_pays_nothing_anywhere_is_refused() -> None:
    block, x = Block(), draw(1, TOKENS, 6)
    observed = block.observed()
    capture = Capture(observed, {"gram", "row_gram", "head_gram"}, find_roles(lambda: block(x), observed))
    q, k, v = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, ROW)).transpose(1, 2) for w in (block.q, block.k, block.v))
    with capture:
        torch.nn.functional.linear(x, block.v)
        nothing = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=nothing)
    capture.next_batch()
    with pytest.raises(NumericsError, match="v: the attention holds a NaN"):
        capture.finish()


def test_tokens_weigh_by_the_attention_they_are_paid() -> None:
    q, k = torch.zeros(2, 1, 3, ROW), torch.zeros(2, 1, 3, ROW)
    q[0, 0, :, 0], k[0, 0, 1, 0] = 1.0, 50.0  # in the first text everything looks at token 1, in the second at all alike
    weights = token_weights(Attention(q, k, k, None, False, 1.0))
    other = 3 / (2 + MOST)
    torch.testing.assert_close(weights, torch.tensor([[other, MOST * other, other], [1.0, 1.0, 1.0]]))


def test_weighted_gram() -> None:
    block, x = Block(), draw(3, TOKENS, 6)
    stats = measure(block, x, {"gram", "attention_gram"})
    q, k, v = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, ROW)).transpose(1, 2) for w in (block.q, block.k, block.v))
    weights = token_weights(Attention(q, k, v, None, True, ROW**-0.5)).flatten()
    rows = x.flatten(0, 1)
    torch.testing.assert_close(stats["q"].attention_gram, (rows * weights[:, None]).T @ rows / len(rows))
    assert stats["up"].attention_gram is not None, "layers behind the attention are weighed by it too"
    assert not torch.allclose(stats["q"].attention_gram, stats["q"].gram)


def test_a_block_without_attention_is_refused() -> None:
    w = draw(3, 6)
    capture = Capture([Observed("w", w)], {"gram", "attention_gram"})
    with capture:
        torch.nn.functional.linear(draw(TOKENS, 6), w)
    capture.next_batch()
    with pytest.raises(CalibrationError, match="never calls torch's attention"):
        capture.finish()
