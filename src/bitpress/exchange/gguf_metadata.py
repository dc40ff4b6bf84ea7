"""What a GGUF file says of a model, from transformers' configuration: shapes, rotations, and what llama.cpp cannot compute."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.exchange.gguf_names import ARCHITECTURES

__all__ = ["find_architecture", "frequency_tensors", "set_metadata", "whole_config"]

_ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh"}
# Whether the weights of the chosen experts are made to sum to one: src/models/ of llama.cpp, the argument norm_w of build_moe_ffn.
_WEIGHTS_OF_ONE = {"qwen2moe": False, "qwen3moe": True, "olmoe": False}


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the defaults that it leaves out."""
    from transformers import AutoConfig

    values = {
        key: value for key, value in config.items() if key not in ("model_type", "quantization_config", "transformers_weights")
    }
    whole: dict[str, Any] = AutoConfig.for_model(config["model_type"], **values).to_dict()
    return whole


def find_architecture(config: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of an architecture. Raises UsageError for a model that its code does not compute."""
    kind = config.get("model_type")
    name = next((name for name, row in ARCHITECTURES.items() if kind in row.models), None)
    if name is None:
        known = ", ".join(model for row in ARCHITECTURES.values() for model in row.models)
        raise UsageError(f"a model of the type {kind!r} has no way to GGUF here; these have: {known}.")
    reason = _reason(name, whole_config(config))
    if reason is not None:
        raise UsageError(f"llama.cpp's {name} computes something else than this model: {reason}.")
    return name


def _reason(name: str, config: Mapping[str, Any]) -> str | None:
    """Say which setting llama.cpp does not follow."""
    wanted = _ACTIVATIONS.get(name, "silu")
    activation = config.get("hidden_activation") or config.get("hidden_act") or wanted
    rope = _rope(config)
    windowed = name not in ("gemma3", "phi3") and config.get("sliding_window") and config.get("use_sliding_window", True)
    default_nope = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    scalar = config.get("query_pre_attn_scalar")
    checks = (
        (activation != wanted, f"its activation is {activation}, not {wanted}"),
        (bool(windowed), "its attention has a window"),
        (
            rope.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3", "longrope"),
            f"its rotations are scaled by {rope.get('rope_type')!r}",
        ),
        (rope.get("rope_type") == "longrope" and name != "phi3", "its rotations are scaled by 'longrope'"),
        (
            name == "smollm3" and config.get("no_rope_layers") not in (None, default_nope),
            "other layers than every fourth have no rotation",
        ),
        (name == "gemma3" and scalar not in (None, _head_dim(config)), f"query_pre_attn_scalar is {scalar}"),
        (bool(config.get("attn_logit_softcapping")), "its attention scores are capped"),
        *_of_mixture(name, config),
    )
    return next((text for is_so, text in checks if is_so), None)


def _of_mixture(name: str, config: Mapping[str, Any]) -> tuple[tuple[bool, str], ...]:
    """Return what could keep a mixture of experts from llama.cpp, whose code of an architecture fixes all of it."""
    if name not in _WEIGHTS_OF_ONE:
        return ()
    heads, one = config["num_attention_heads"], config.get("norm_topk_prob")
    narrow = config["hidden_size"] != heads * _head_dim(config) or (name == "olmoe" and config["num_key_value_heads"] != heads)
    dense = bool(config.get("mlp_only_layers")) or config.get("decoder_sparse_step", 1) != 1
    return (
        (one != _WEIGHTS_OF_ONE[name], f"norm_topk_prob is {one}, not {_WEIGHTS_OF_ONE[name]}"),
        (dense, "some of its layers have no experts"),
        (bool(config.get("clip_qkv")), "its queries, keys and values are clipped"),
        (name != "qwen3moe" and narrow, "its heads together are not as wide as its hidden states"),
        (name != "qwen3moe" and bool(config["tie_word_embeddings"]), "its output head is tied to its embeddings"),
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotations, of layers with full attention where two kinds have their own."""
    rope = config.get("rope_parameters") or {}
    return dict(rope.get("full_attention") or rope)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def set_metadata(writer: Any, name: str, config: Mapping[str, Any]) -> None:
    """Say a writer of GGUF what architecture `name` needs to know of a model."""
    rope = _rope(config)
    head, heads = _head_dim(config), config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(
        int(head * float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1))
    )
    if name != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    _set_scaling(writer, config, rope)
    if name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        writer.add_rope_freq_base_swa(float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0))
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if name == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    experts = "num_local_experts" if name == "llama" else "num_experts"
    for key, tell in (
        (experts, writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if config.get(key):
            tell(config[key])


def _set_scaling(writer: Any, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind == "longrope":
        original = int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
        longer = config["max_position_embeddings"] / original
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0)


def frequency_tensors(config: Mapping[str, Any]) -> dict[str, Float[torch.Tensor, " half"]]:
    """Return the tensors that scale frequencies of rotations: what divides each, of Llama 3 and of LongRoPE."""
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{size}.weight": torch.tensor(rope[f"{size}_factor"], dtype=torch.float32)
            for size in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    head = _head_dim(config)
    inverse = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)  # of a frequency, in the original context
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}
