"""Names on the hub: the pieces of a model are what transformers saves, and make its parameters again."""

from typing import Any

import pytest
import torch

from bitpress.checkpoints.hub_names import Piece, hub_names
from bitpress.models.skeleton import build_config, build_skeleton

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3,
    "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def skeleton(kind: str) -> Any:
    return build_skeleton(build_config({"model_type": kind, **SIZES}), torch.float32)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_pieces_are_what_transformers_saves(kind: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(build_config({"model_type": kind, **SIZES})).state_dict()
    model = skeleton(kind)
    saved, names = revert_weight_conversion(model, state), hub_names(model)
    pieces = {piece.name: piece.cut(state[owner]) for owner, its in names.items() for piece in its}
    assert len(pieces) >= 2 * 3 * 3
    for name, value in pieces.items():
        assert torch.equal(value, saved[name]), name
    assert saved.keys() == pieces.keys() | (state.keys() - names.keys())


def test_experts_of_mixtral_are_gate_then_up() -> None:
    names = hub_names(skeleton("mixtral"))
    prefix = "model.layers.1.block_sparse_moe"
    assert names["model.layers.1.mlp.experts.gate_up_proj"][2:4] == (
        Piece(f"{prefix}.experts.1.w1.weight", (24, 16), 48, 72),
        Piece(f"{prefix}.experts.1.w3.weight", (24, 16), 72, 96),
    )
    assert names["model.layers.1.mlp.gate.weight"] == (Piece(f"{prefix}.gate.weight", (3, 16), 0, 3),)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_a_model_that_the_hub_names_as_transformers_does_has_none(kind: str) -> None:
    assert hub_names(skeleton(kind)) == {}


def test_a_conversion_that_moves_more_than_rows_leaves_the_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    def turned(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.flip(0) for name, value in state.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", turned)
    assert hub_names(skeleton("mixtral")) == {}
