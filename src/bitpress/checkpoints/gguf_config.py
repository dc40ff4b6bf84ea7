"""Configurations of architectures that transformers does not read out of GGUF, from the metadata of a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["own_config"]

# Keys of llama.cpp below the architecture's name, and transformers'.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class _Model:
    """A model of transformers: its type, its name of the number of experts, and what llama.cpp computes without saying it."""

    kind: str
    experts: str = "num_experts"
    fixed: Mapping[str, Any] = field(default_factory=dict)


_MODELS = {
    "smollm3": _Model("smollm3"),
    "olmo2": _Model("olmo2"),
    "olmoe": _Model("olmoe", fixed={"norm_topk_prob": False}),
    "qwen2moe": _Model("qwen2_moe", fixed={"norm_topk_prob": False}),
    "qwen3moe": _Model("qwen3_moe", fixed={"norm_topk_prob": True}),
}
_MIXTRAL = _Model("mixtral", "num_local_experts")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def own_config(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values of a configuration, `model_type` among them; None for what transformers reads itself."""
    architecture = metadata.get("general.architecture")
    mixture = architecture == "llama" and bool(metadata.get("llama.expert_count"))
    model = _MIXTRAL if mixture else _MODELS.get(str(architecture))
    if model is None:
        return None
    values: dict[str, Any] = {"model_type": model.kind, **model.fixed}
    for key, ours in {**_KEYS, "expert_count": model.experts}.items():
        if f"{architecture}.{key}" in metadata:
            values[ours] = metadata[f"{architecture}.{key}"]
    for key, ours in _TOKENS.items():
        if f"tokenizer.ggml.{key}" in metadata:
            values[ours] = metadata[f"tokenizer.ggml.{key}"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0)}
    return values
