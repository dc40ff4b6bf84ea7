"""Tiny models of every causal language model that transformers knows, shrunk from the defaults of its configuration.

A size is recognised by the name of its key, in sub-configurations too; lists of one entry a layer keep one layer of every kind. What the
names do not say stands in `OWN`.
"""

from pathlib import Path
from typing import Any

import torch

LAYERS = 4
VOCABULARY = 384
CONTEXT = 256
MOST_PARAMETERS = 8_000_000
TOKENS = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(3))

_SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"),
    64: (
        *("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim", "embedding_dim"),
        *("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width", "out_hidden_size"),
        *("hidden_size_global", "conv_output_size", "dim_model_base", "hidden_size_per_layer_input", "mamba_d_ssm"),
    ),
    128: (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "dim_ff", "d_inner", "n_inner"),
        *("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size", "mlp_dim"),
    ),
    LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers"),
        *("num_encoder_layers", "num_blocks", "depth", "conf_num_hidden_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        *("num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "swa_num_attention_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads", "mamba_num_heads"),
        *("linear_num_value_heads", "linear_num_heads", "index_n_heads", "zero_expert_num", "conf_num_attention_heads"),
        *("attention_head_count", "n_mamba_heads", "num_centroids"),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk"),
        *(
            "moe_k",
            "moe_top_k",
            "top_k_experts",
            "swa_num_key_value_heads",
            "linear_num_key_heads",
            "n_group",
            "num_expert_group",
        ),
        *("num_global_key_value_heads", "mamba_n_groups", "n_groups", "num_global_layers", "num_query_groups"),
        *("centroid_intermediate_top_k", "num_kv_shared_layers", "topk_group"),
    ),
    16: (
        *("head_dim", "d_head", "dim_head", "d_kv", "qk_head_dim", "v_head_dim", "qk_nope_head_dim", "swa_head_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "global_head_dim", "attention_head_size"),
        *("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim", "query_pre_attn_scalar"),
        *("index_head_dim", "kv_channels", "d_rel", "index_topk", "time_step_rank", "mamba_dt_rank", "router_hidden_size"),
    ),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"),
        *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "q_lora_rank", "kv_lora_rank"),
        *("o_lora_rank", "laurel_rank", "hc_lowrank", "loop_gate_rank", "gated_norm_rank", "adapter_rank", "sliding_window"),
        *("sliding_window_size", "attention_chunk_size", "chunk_size", "mamba_chunk_size", "window_size", "rel_extent"),
        *("attention_window_size", "local_attention", "floor_scale", "keep_window_size"),
    ),
    8: ("qk_rope_head_dim", "rotary_dim"),
    CONTEXT: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length"),
        *("original_max_position_embeddings", "model_max_length", "log_scaling_n_floor"),
    ),
    1: ("num_nextn_predict_layers", "first_k_dense_replace", "num_dense_layers", "rescale_every", "moe_layer_start_index"),
}
_SMALL = {key: value for value, keys in _SIZES.items() for key in keys}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

_DOTS3 = {str(i): {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "head_dim": 24} for i in (2, 3)}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128}
_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
}
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
    **{"ple_embed_dim": 16, "ngram_vocab_size_base": 100, "split_ngram_parts": 2},
}

_ASSISTANT: dict[str, Any] = {
    **{f"text_config.{key}": value for key, value in _GEMMA4.items() if not key.endswith("per_layer_input")},
    "text_config.num_kv_shared_layers": 4,
}

# What the defaults of a configuration need to be valid.
START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
# What the names of the keys do not say. Keys of a sub-configuration follow its name and a dot.
OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 500, "vocab_size": 260},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {  # written as twice as many layers: attention and mlp apart
        **{"num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2},
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    },
    "dots3_note": {
        "text_config.per_layer_config": _DOTS3,
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_text": {"per_layer_config": _DOTS3},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": _MAMBA,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {
        key: value for key, value in _GEMMA4.items() if key not in ("num_kv_shared_layers", "hidden_size_per_layer_input")
    },
    "gemma4": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_unified": {
        f"text_config.{key}": value
        for key, value in _GEMMA4.items()
        if key not in ("num_kv_shared_layers", "hidden_size_per_layer_input")
    },
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {"audio_config.num_blocks": 1, "vision_config.num_hidden_layers": 1},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "roc_bert": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "mamba_headdim": 32,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "hybrid_layer_ids": [1, 3],
        "kv_channels": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def names() -> list[str]:
    """Return every model_type that transformers opens as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with small sizes; lists of one entry a layer become LAYERS long with every kind of layer in them."""
    depth = next((values[key] for key in _SIZES[LAYERS][:9] if isinstance(values.get(key), int)), 0)
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == depth > LAYERS}
    chosen = _choose_layers(lists, depth)
    small: dict[str, Any] = {}
    own = values.get("per_layer_config")
    if own:
        own = {int(key): shrink(value) for key, value in own.items()}
        values = {**values, "per_layer_config": {str(at): own[i] for at, i in enumerate(chosen) if i in own}}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling", "per_layer_config"):
            small[key] = shrink(value)
        elif key in lists:
            small[key] = [min(value[i], _SMALL[key]) if key in _SMALL else value[i] for i in chosen]
        elif key in _TOKENS and isinstance(value, (int, list)):
            small[key] = _TOKENS[key]
        elif key in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, _SMALL[key])
        elif isinstance(value, float) and key in ("initializer_range", "init_std"):
            small[key] = 0.1  # large enough that the logits differ
        else:
            small[key] = value
    if "qk_rope_head_dim" in small and "qk_nope_head_dim" in small:  # a query is what is turned and what is not
        turned = {"head_dim": small["qk_rope_head_dim"], "qk_head_dim": small["qk_rope_head_dim"] + small["qk_nope_head_dim"]}
        small |= {key: value for key, value in turned.items() if key in small}
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _choose_layers(lists: dict[str, list[Any]], depth: int) -> list[int]:
    """Choose the first layer of every kind, then the first ones of all, in their order."""
    kinds: dict[str, int] = {}
    for i in range(depth):
        kinds.setdefault(repr([value[i] for value in lists.values()]), i)
    first = sorted(kinds.values())[:LAYERS]
    others = [i for i in range(depth) if i not in first][: LAYERS - len(first)]
    return sorted(first + others)


def small_config(model_type: str) -> Any:
    """Return the configuration of a tiny model. Raises what the configuration's own class raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    values = shrink(made(**START.get(model_type, {})).to_dict())
    for key, value in OWN.get(model_type, {}).items():
        owner, path = values, key.split(".")
        for part in path[:-1]:
            owner = owner[part]
        owner[path[-1]] = value
    for key in ("architectures", "transformers_version"):
        values.pop(key, None)
    return made.from_dict(values)


def build(model_type: str) -> Any:
    """Return a tiny model of random weights. Raises what its class raises, ValueError where the sizes are not small."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = small_config(model_type)
    with init_empty_weights(include_buffers=False):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{model_type}: {count:,} parameters are no tiny model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for value in model.parameters():
            if (value.ndim >= 2 and float(value.detach().std()) < 0.02) or not value.detach().any():
                torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def save(model: Any, path: Path) -> None:
    """Write a model with a tokenizer of single bytes."""
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT)


def recipes(text: Path) -> dict[str, dict[str, Any]]:
    """Return what every architecture is tried with: rounding, and the default and a preset's parts on a short text."""
    calibration = {"text": str(text), "samples": 4, "length": 32}
    some = {"calibration": calibration, "batch": 2, "min_expert_tokens": 1, "compute": "fp32"}
    return {
        "rounding": {"weights": "int4-g32-zero", "quantizer": {"name": "rtn"}},
        "default": {"weights": "int4-g32-zero", **some},
        "preset": {
            "weights": "int4-g32-zero",
            "transforms": ["balance", {"name": "hadamard", "outputs": True}],
            "quantizer": {"name": "ldlq", "passes": 2},
            **some,
        },
    }


def walk_the_road(model_type: str, folder: Path, recipe: dict[str, Any]) -> str:
    """Build, save, quantize and load a tiny model, and hold its logits against the original's with decoded weights in it.

    Return how it went in words: "works", or why bitpress refuses it. What neither works nor is refused raises.
    """
    from transformers import AutoModelForCausalLM

    import bitpress
    from bitpress.checkpoints.compressed import CompressedCheckpoint
    from bitpress.checkpoints.safetensors_file import read_tensor
    from bitpress.errors import CheckpointError
    from bitpress.models.tasks.table import find_task

    source, out = folder / "source", folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = build(model_type)
    except AttributeError:  # a model of several parts has not what its decoder alone would ask it for
        try:
            find_task(small_config(model_type), str(source))
        except CheckpointError as error:
            return str(error).removeprefix(f"{source}: ")
        raise
    save(model, source)
    try:
        bitpress.quantize(source, out, recipe=recipe, proof_tokens=0)
    except CheckpointError as error:
        return str(error).removeprefix(f"{source}: ")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if hasattr(original.config, "rescale_every"):
        original.config.rescale_every = 0
    compressed = CompressedCheckpoint.open(out)
    with torch.no_grad():
        for name, record in compressed.manifest.weights.items():
            decoded = record.parameter(name).restore(compressed.read_weight(name).dequantize())
            original.get_parameter(name).copy_(decoded)
        own = original.state_dict()
        for name, entry in compressed.plain.items():  # scales may have been folded into norms
            own[name].copy_(read_tensor(compressed.tensors[name][0], entry))
        expected = original(input_ids=TOKENS, use_cache=False).logits
        for form in ("decoded", "packed"):
            got = bitpress.load(out, weights=form, dtype="fp32")(input_ids=TOKENS, use_cache=False).logits
            largest = float((got - expected).abs().max() / expected.abs().max())
            # A product may sum in another order: float32, and the longest sum here has 128 terms.
            assert largest < 1e-4, f"{model_type}: logits of {form} weights are {largest:.2g} away"
    return "works"
