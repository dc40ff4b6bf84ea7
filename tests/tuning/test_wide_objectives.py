"""Objectives of several blocks: the gradient is that of blocks run plainly, and the KL divergence that of its definition."""

import pytest
import torch

from bitpress.tuning.wide_objectives import NetworkObjective, Teacher, WindowObjective

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Blocks:
    """Three blocks tanh(x w); those of `made` count how often their weights are read."""

    def __init__(self) -> None:
        self.w = {f"{i}": drawn(5, 5, seed=i).requires_grad_() for i in range(3)}
        self.runs = [lambda hidden, values, i=i: torch.tanh(hidden @ values[f"{i}"]) for i in range(3)]
        self.x, self.y = drawn(6, 4, 5, seed=10), {1: drawn(6, 4, 5, seed=11), 2: drawn(6, 4, 5, seed=12)}


def test_checkpoints_change_no_gradient() -> None:
    made = Blocks()
    rows = torch.tensor([0, 3])
    objective = WindowObjective(made.runs, made.x, made.y, 4, "mse", batch=2, device=CPU)
    leaves = list(made.w.values())
    found = torch.autograd.grad(objective.loss(made.w, rows), leaves)
    hidden, plain = made.x[rows], torch.zeros(())
    for i in range(3):
        hidden = torch.tanh(hidden @ made.w[f"{i}"])
        if i in made.y:
            plain = plain + (hidden - made.y[i][rows]).square().mean() / made.y[i][:4].square().mean() / 2
    for a, b in zip(found, torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # Held-out windows are those behind the counted ones.
    with torch.no_grad():
        assert objective.held_out(made.w) == pytest.approx(float(objective.loss(made.w, torch.tensor([4, 5]))))


def test_what_a_network_says_is_compared_over_the_likeliest_tokens() -> None:
    made, head, wanted = Blocks(), drawn(5, 9, seed=20), drawn(6, 4, 9, seed=21)
    tokens = torch.zeros(6, 4, dtype=torch.long)

    def objective(top: int) -> NetworkObjective:
        teacher = Teacher.of([wanted[:2], wanted[2:]], top)
        says = lambda inputs, hidden: hidden @ head
        own = lambda logits, inputs: logits.mean()
        return NetworkObjective(made.runs, says, tokens, made.x, 4, own, teacher, batch=2, device=CPU)

    rows = torch.tensor([1, 2])
    hidden = made.x[rows]
    for i in range(3):
        hidden = torch.tanh(hidden @ made.w[f"{i}"])
    p, q = wanted[rows].log_softmax(-1), (hidden @ head).log_softmax(-1)
    whole = objective(9).loss(made.w, rows)
    torch.testing.assert_close(whole, (p.exp() * (p - q)).sum(-1).mean())
    # Over three tokens both are normalised over these.
    at = wanted[rows].topk(3).indices
    p, q = p.gather(-1, at).log_softmax(-1), q.gather(-1, at).log_softmax(-1)
    torch.testing.assert_close(objective(3).loss(made.w, rows), (p.exp() * (p - q)).sum(-1).mean())
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(whole, list(made.w.values())))
