"""The training of the models that ship inside the package: a resumed run is the uninterrupted one; unseen text stays unseen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from progress_record import Said
from scan import own_scan
from tiny_texts import SHARED_RUN, chunks, holds_chunk, without_shared
from train_tiny import MODELS, Plan, balance, batch_of, build_model, rate, train

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
PLAN = Plan(steps=7, cosine_steps=9, cool_from=5, batch=2, length=8, warm_steps=2, save_every=3, judge_every=4)


class Interrupted(Said):
    """Stops a run after its fifth step."""

    def advance(self, unit: str, **figures: Any) -> None:
        if unit == "step 5":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("config", "more", "aux"),
    [("LlamaConfig", {}, 0.0), ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 0.02)],
)
def test_a_resumed_run_ends_in_the_same_bytes(config: str, more: dict[str, Any], aux: float, tmp_path: Path) -> None:
    from dataclasses import replace

    windows = torch.randint(0, 32, (9, 8), generator=torch.Generator().manual_seed(3))
    plan = replace(PLAN, aux=aux)

    def run(folder: Path, progress: Said) -> tuple[Any, Any]:
        model = build_model(config, SHAPE | more, seed=5)
        return model, train(model, windows, windows[:2], plan, folder, progress)

    whole, curve = run(tmp_path / "whole", Said())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Interrupted())
    again, resumed = run(tmp_path / "parts", Said())
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert [(row.step, row.loss, row.heldout_loss) for row in resumed] == [(r.step, r.loss, r.heldout_loss) for r in curve]
    assert [row.step for row in curve if row.heldout_loss is not None] == [1, 4, 7]
    assert not torch.equal(whole.state_dict()["lm_head.weight"], build_model(config, SHAPE | more, 5).lm_head.weight)


def test_every_round_over_the_text_has_every_window_once_in_an_order_of_its_own() -> None:
    windows = torch.arange(9)[:, None]
    rounds = [torch.cat([batch_of(windows, PLAN, 4 * turn + at) for at in range(4)]).flatten().tolist() for turn in range(2)]
    assert all(len(set(taken)) == 8 for taken in rounds)
    assert rounds[0] != rounds[1]


def test_an_expert_that_one_layer_never_uses_costs_though_another_layer_uses_it_the_more() -> None:
    def routed(*pairs: tuple[int, int]) -> torch.Tensor:
        logits = torch.full((len(pairs), 4), -20.0)
        for row, pair in enumerate(pairs):
            logits[row, list(pair)] = 20.0
        return logits

    even = routed((0, 1), (2, 3))
    assert balance([even, even], 2).item() == pytest.approx(2.0)
    assert balance([routed((0, 1), (0, 1)), routed((2, 3), (2, 3))], 2).item() == pytest.approx(4.0)


@pytest.mark.parametrize("plan", [PLAN, *(tiny.plan for tiny in MODELS.values())])
def test_the_rate_rises_and_falls_to_its_floor_without_a_jump(plan: Plan) -> None:
    rates = [rate(plan, step) for step in range(plan.steps + 1)]
    peak = rates.index(max(rates))
    assert peak in (plan.warm_steps - 1, plan.warm_steps)
    assert max(rates) == pytest.approx(plan.peak_rate)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[plan.warm_steps :] == sorted(rates[plan.warm_steps :], reverse=True)
    assert rates[-1] == pytest.approx(plan.floor * plan.peak_rate)


def test_text_that_shares_a_run_with_an_unseen_text_is_dropped() -> None:
    unseen_text = " ".join(f"word{number}" for number in range(200))
    unseen = chunks([unseen_text])
    runs = [unseen_text[at : at + SHARED_RUN] for at in range(0, len(unseen_text) - SHARED_RUN, 7)]
    assert all(holds_chunk(f"before {run} after", unseen) for run in runs)
    other = "A paragraph of its own, which no unseen text holds."
    assert without_shared(f"{other}\n\nSee {runs[3]}\n\n{other}", unseen) == f"{other}\n\n{other}"
    assert without_shared(runs[5].replace(" ", "\n\n"), unseen) == ""  # a run that straddles paragraphs


def test_the_scan_for_training_is_that_of_transformers_with_its_gradients() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3, "initializer_range": 0.5}
    torch.manual_seed(6)
    model = MambaForCausalLM(MambaConfig(**shape)).train()
    tokens = torch.arange(12).reshape(2, 6)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    theirs = step()
    with own_scan():
        ours = step()
    assert len(ours) == 1 + len(list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    with own_scan(), pytest.raises(ValueError, match="it has no cache"):
        model.eval()(input_ids=tokens, use_cache=True)
