"""Places: weights with the same inputs, and those that write the residual stream, whatever their names are."""

from collections.abc import Callable
from pathlib import Path

import torch

from bitpress.checkpoints.parameter import stem
from bitpress.models.opening import open_original
from bitpress.models.places import find_places

# By the architecture: the weights of the last block that share their inputs, and those that write the stream, by their names in the block.
_QKV = "self_attn.k_proj self_attn.q_proj self_attn.v_proj"
_SWIGLU = "mlp.gate_proj mlp.up_proj"
_OUT = {"self_attn.o_proj", "mlp.down_proj"}
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "llama": ({_QKV, _SWIGLU}, _OUT),
    "mixtral": ({_QKV, "mlp.experts.gate_up_proj mlp.gate"}, {"self_attn.o_proj", "mlp.experts.down_proj"}),
    "gpt2": (set(), {"attn.c_proj", "mlp.c_proj"}),
    "opt": ({_QKV}, {"self_attn.out_proj", "fc2"}),
    "gemma3": ({_QKV, _SWIGLU}, _OUT),
    "phi3": (set(), _OUT),
    "jetmoe": (
        {
            "mlp.input_linear mlp.router.layer",
            "self_attention.experts.input_linear self_attention.experts.router.layer self_attention.kv_proj",
        },
        {"self_attention.experts.output_linear", "mlp.output_linear"},
    ),
    "llama4": (
        {
            _QKV,
            "feed_forward.experts.gate_up_proj feed_forward.router feed_forward.shared_expert.gate_proj "
            "feed_forward.shared_expert.up_proj",
        },
        {"self_attn.o_proj", "feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj"},
    ),
    "qwen3_moe": ({_QKV, "mlp.experts.gate_up_proj mlp.gate"}, {"self_attn.o_proj", "mlp.experts.down_proj"}),
    "mamba": (set(), {"mixer.out_proj"}),
    "mamba2": (set(), {"mixer.out_proj"}),
}


def test_weights_are_placed_by_what_the_model_does(spine: str, tiny_model: Callable[..., Path]) -> None:
    model, _ = open_original(tiny_model(spine), torch.float32)
    prefix = f"{model.block_name(len(model.blocks) - 1)}."
    places = {stem(name).removeprefix(prefix): place for name, place in find_places(model).items() if name.startswith(prefix)}
    together: dict[int, list[str]] = {}
    for name in sorted(places):
        together.setdefault(places[name].inputs, []).append(name)
    shared = {" ".join(names) for names in together.values() if len(names) > 1}
    assert (shared, {name for name, place in places.items() if place.writes}) == EXPECTED[spine]
