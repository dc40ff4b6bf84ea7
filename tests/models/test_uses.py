"""What a parameter does is found by running the model without weights: routers, orientation, and what is no product."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitpress.errors import CheckpointError
from bitpress.models.tasks.causal_lm import CausalLM
from bitpress.models.uses import Axis, Product, Use, find_uses

WIDTH, EXPERTS = 8, 5


class Toy(nn.Module):
    """A causal language model of one layer, as far as it matters here."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=16)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.embed, self.layer = nn.Embedding(16, WIDTH), layer

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.layer(self.embed(input_ids)))


def uses_of(layer: nn.Module) -> dict[str, Use]:
    model = Toy(layer).to("meta")
    found = find_uses(model, CausalLM())
    assert all(p.is_meta for p in model.parameters())  # its own parameters are back
    return {name.removeprefix("layer."): use for name, use in found.items() if name.startswith("layer.")}


class ListOfExperts(nn.Module):
    """Experts as a list of modules; the router, and other matrices of as many rows."""

    def __init__(self, choose: str = "topk", biased: bool = False) -> None:
        super().__init__()
        self.choose = choose
        self.router = nn.Linear(WIDTH, EXPERTS, bias=biased)
        self.key, self.back = nn.Linear(WIDTH, EXPERTS), nn.Linear(EXPERTS, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.back(torch.relu(self.key(x)))).flatten(0, 1)
        scores = self.router(x).softmax(-1)
        if self.choose == "topk":
            chosen = scores.topk(2, dim=-1).indices
        elif self.choose == "everything":
            chosen = scores.topk(EXPERTS).indices
        elif self.choose == "argmax":
            chosen = scores.argmax(-1, keepdim=True)
        elif self.choose == "sort":
            chosen = scores.sort(descending=True)[1][:, :2]
        else:
            chosen = scores.max(-1, keepdim=True)[1]
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).any(-1).nonzero().flatten()
            out.index_add_(0, rows, expert(x[rows]) * scores[rows, e, None])
        return out


@pytest.mark.parametrize("choose", ["topk", "everything", "argmax", "sort", "max"])
def test_a_router_is_what_chooses_experts(choose: str) -> None:
    found = uses_of(ListOfExperts(choose))
    assert {name for name, use in found.items() if use.router} == {"router.weight"}
    assert all(use.products for use in found.values())


class Apart(nn.Module):
    """Four matrices of one shape, of which one output is made indices of that nothing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).mT
        scores = scores - scores.max(-1, keepdim=True).values
        chosen = scores.topk(3).indices  # tokens, as sparse attention chooses them
        mask = torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
        value = self.v(x)
        value = value - value.max(-1, keepdim=True)[0]
        out: torch.Tensor = self.o((scores + mask).softmax(-1) @ value)
        return out


def test_a_choice_among_tokens_or_one_that_nothing_uses_makes_no_router() -> None:
    assert not any(use.router for use in uses_of(Apart()).values())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.gate, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.shared(x) * self.gate(x).sigmoid() * self.wide(x)


def test_the_gate_of_a_shared_expert_is_a_router() -> None:
    assert {name for name, use in uses_of(Gated()).items() if use.router} == {"gate.weight"}


def whole(rows: int, columns: int) -> Product:
    return Product(Axis(1, columns), Axis(columns, rows))


class One(nn.Module):
    """One parameter and what is done with it."""

    def __init__(self, how: Any, *shape: int) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.empty(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.how(x, self.w)
        return out


SQUARE = (WIDTH, WIDTH)
STACK = (EXPERTS, *SQUARE)
TRANSPOSED = Product(Axis(WIDTH, WIDTH), Axis(1, WIDTH))


@pytest.mark.parametrize(
    ("how", "shape", "products", "computed", "others"),
    [
        (lambda x, w: F.linear(x, w), SQUARE, {whole(*SQUARE)}, False, set()),
        (lambda x, w: x @ w.T, SQUARE, {whole(*SQUARE)}, False, set()),
        (lambda x, w: x @ w, SQUARE, {TRANSPOSED}, False, set()),
        (lambda x, w: torch.einsum("bti,oi->bto", x, w), SQUARE, {whole(*SQUARE)}, False, set()),
        (lambda x, w: x @ w[:3].T, SQUARE, {whole(3, WIDTH)}, False, set()),
        (lambda x, w: x @ w[2], STACK, {replace(TRANSPOSED, start=2 * WIDTH**2)}, False, set()),
        (lambda x, w: torch.bmm(x.expand(EXPERTS, -1, -1), w.mT), STACK, {whole(*SQUARE)}, False, set()),
        (lambda x, w: torch.baddbmm(x, x.expand(EXPERTS, -1, -1), w), STACK, {TRANSPOSED}, False, set()),
        (lambda x, w: x @ (w * 2).T, SQUARE, set(), True, set()),
        (lambda x, w: x @ w.double().float().T, SQUARE, set(), True, set()),
        (lambda x, w: (w @ x.mT).mT, SQUARE, set(), True, set()),
        (lambda x, w: x * w[0], SQUARE, set(), False, {"mul"}),
        (lambda x, w: x.clone().add_(w[1]), SQUARE, set(), False, {"add"}),
        (lambda x, w: x + F.embedding(torch.arange(x.shape[1]), w), (32, WIDTH), set(), False, {"embedding"}),
        (lambda x, w: F.conv1d(x.mT, w, groups=WIDTH), (WIDTH, 1, 1), set(), False, {"convolution of each channel"}),
        (lambda x, w: F.conv1d(x.mT, w), (WIDTH, WIDTH, 1), set(), True, set()),
        (lambda x, w: x, SQUARE, set(), False, set()),
    ],
)
def test_uses(how: Any, shape: tuple[int, ...], products: set[Product], computed: bool, others: set[str]) -> None:
    use = uses_of(One(how, *shape))["w"]
    assert (use.products, use.computed, use.others, use.router) == (products, computed, others, False)


def test_a_model_that_does_not_run_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"Toy: its code does not run on short inputs: .*\[9, 8\]"):
        uses_of(One(lambda x, w: x @ w, WIDTH + 1, WIDTH))
