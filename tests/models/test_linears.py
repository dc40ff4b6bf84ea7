"""Over mixtures of experts: exactly the routers are kept, every other product is compressed, whatever sizes coincide."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import CheckpointError, UsageError
from bitpress.models.linears import list_kept_outside, list_weights
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe

# Sizes that coincide: as many experts as anything that a matrix can have rows of; as many as heads, all of them chosen for every token.
WIDE = {"size": 32, "experts": 32, "chosen": 2}
ALL = {"size": 32, "experts": 2, "chosen": 2}
# Ways to route that differ; the others are like one of these.
APART = ("mixtral", "qwen3_next", "deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "longcat_flash", "dbrx")

_GATE = r"mlp\.gate\.weight"
_SHARED = rf"({_GATE}|mlp\.shared_expert_gate\.weight)"
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
# architecture: its routers, what else it keeps (of two or more axes), and what it needs beside the sizes
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (_GATE, "", {}),
    "qwen2_moe": (_SHARED, "", {"decoder_sparse_step": 1}),
    "qwen3_moe": (_GATE, "", {}),
    "qwen3_next": (_SHARED, r"conv1d\.weight", {**_HYBRID}),
    "qwen3_5_moe_text": (_SHARED, r"conv1d\.weight", {**_HYBRID}),
    "deepseek_v2": (_GATE, "", {"topk_method": "greedy", "num_key_value_heads": 2}),
    "deepseek_v3": (_GATE, "", {"n_group": 1, "topk_group": 1, "num_key_value_heads": 2}),
    "deepseek_v32": (_GATE, "", {"n_group": 1, "topk_group": 1, "num_key_value_heads": 2}),
    "glm4_moe": (_GATE, "", {"n_group": 1}),
    "dots1": (_GATE, "", {"n_group": 1, "n_shared_experts": 1}),
    "gpt_oss": (r"mlp\.router\.weight", r"(gate_up|down)_proj_bias", {}),
    "jetmoe": (r"router\.layer\.weight", "", {}),
    "olmoe": (_GATE, "", {}),
    "flex_olmo": (_GATE, "", {}),
    "granitemoe": (r"router\.weight", "", {}),
    "granitemoeshared": (r"router\.weight", "", {}),
    "phimoe": (r"router\.weight", "", {}),
    "jamba": (r"router\.weight", r"(A_log|conv1d\.weight|dt_proj\.weight)", {"num_hidden_layers": 2}),
    "llama4_text": (r"router\.weight", "", {}),
    "minimax": (_GATE, "", {**_HYBRID}),
    "ernie4_5_moe": (_GATE, r"e_score_correction_bias", {"moe_layer_start_index": 0}),
    "hunyuan_v1_moe": (r"gate\.wg\.weight", "", {}),
    "longcat_flash": (r"router\.classifier\.weight", "", {"num_hidden_layers": 2, "num_layers": 2}),
    "gemma4_text": (r"router\.proj\.weight", "", {"enable_moe_block": True, "hidden_size_per_layer_input": 0}),
    "dbrx": (r"ffn\.router\.layer\.weight", "", {}),
}


def configuration(model_type: str, size: int, experts: int, chosen: int, **changes: Any) -> Any:
    """A configuration whose every width is `size`, with two heads."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in this transformers")
    if model_type == "dbrx":
        ffn = {"ffn_hidden_size": size, "hidden_size": size, "moe_num_experts": experts, "moe_top_k": chosen}
        attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
        sizes = {"d_model": size, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 64}
        return CONFIG_MAPPING[model_type](**sizes, attn_config=attention, ffn_config=ffn)
    every = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_hidden_size"), size),
        **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), size),
        **dict.fromkeys(("intermediate_size_mlp", "kv_lora_rank", "q_lora_rank", "mamba_d_state"), size),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads"), 2),
        **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), size // 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), size // 2),
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_global_key_value_heads"), 2),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), chosen),
        **{"qk_rope_head_dim": size // 2, "first_k_dense_replace": 0, "zero_expert_num": 1, "mamba_dt_rank": 8},
        **{"vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 64, "index_topk": 4, "n_group": 1, "topk_group": 1},
        **{"num_kv_shared_layers": 0, "tie_word_embeddings": False, "num_hidden_layers": 1},
    }
    known = CONFIG_MAPPING[model_type]().to_dict().keys() | {"tie_word_embeddings", "num_hidden_layers"}
    return CONFIG_MAPPING[model_type](**{key: value for key, value in every.items() if key in known} | changes)


@pytest.mark.parametrize(
    ("model_type", "sizes"), [*((name, WIDE) for name in MIXTURES), *((name, ALL) for name in APART)], ids=str
)
def test_exactly_the_routers_are_kept(model_type: str, sizes: dict[str, int]) -> None:
    router, other, changes = MIXTURES[model_type]
    model = StreamedModel(configuration(model_type, **sizes, **changes), None, torch.float32)
    routers = 0
    for i in range(len(model.blocks)):
        weights, kept = list_weights(model, i, ())
        found = {w.name: w for w in weights}
        for name, value in model.model.named_parameters():
            if not name.startswith(f"{model.block_name(i)}."):
                continue
            if value.ndim < 2:
                assert kept[name] == "norm, bias or other vector"
            elif re.search(f"{router}$", name):
                assert kept[name] == "router", name
                routers += 1
            elif other and re.search(f"{other}$", name):
                assert kept[name] != "router", name
            else:
                assert found[name].parameter_shape == tuple(value.shape), (name, kept.get(name))
        assert not set(found) & set(kept)
    assert routers >= 1
    assert set(list_kept_outside(model, ()).values()) <= {"embedding", "head", "norm, bias or other vector"}


# Forms of experts beside those of mixtral and qwen3_moe, which are calibrated elsewhere, in square matrices where they can be; and of matrices that all tokens go through.
FORMS: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "llama4_text": {},
    "jetmoe": {},
    "dbrx": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("model_type", FORMS)
def test_every_form_of_experts_is_calibrated_and_read_again(
    model_type: str, tiny_tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = configuration(model_type, size=32, experts=3, chosen=2, **FORMS[model_type])
    config.vocab_size = 384
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for p in original.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1)
    original.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    calibration = {"text": str(text_file), "samples": 2, "length": 32}
    recipe = {"weights": "int8-g16-zero", "quantizer": "gptq", "calibration": calibration, "min_expert_tokens": 1}
    report = bitpress.quantize(tmp_path / "model", tmp_path / "out", recipe=recipe, proof_tokens=0)

    # With 64 tokens every expert is reached: each is calibrated, in the orientation in which it is used.
    assert report["calibrated"] == {"weights": len(report["layers"]), "of": len(report["layers"])}
    for row in report["layers"]:
        if isinstance(row["tokens"], list):
            reached = 64 * (config.num_attention_heads if model_type == "recurrent_gemma" else 2)
            assert sum(row["tokens"]) == reached, row["name"]
            assert all(0 < tokens <= 64 for tokens in row["tokens"])

    filled = CompressedCheckpoint.open(tmp_path / "out").load("")
    tokens = torch.arange(8, 40).reshape(2, 16)
    with torch.no_grad():
        before = original(tokens, use_cache=False).logits
        for name, value in filled.items():
            original.state_dict()[name].copy_(value)
        expected = original(tokens, use_cache=False).logits
        assert 0 < (expected - before).norm() < 0.2 * before.norm()
        for weights in ("decoded", "packed"):
            loaded = bitpress.load(tmp_path / "out", weights=weights)
            torch.testing.assert_close(loaded(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_kept_says_why(tiny_model: Callable[..., Path]) -> None:
    recipe = make_recipe({"weights": "int8-row", "quantizer": "rtn", "skip": ["*.k_proj", "*.gate"]})
    plan, _, _ = plan_run(tiny_model("qwen3_moe"), build_method(recipe))
    assert {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in plan.kept.items()} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.norm.weight": "norm, bias or other vector",
        "model.layers.*.input_layernorm.weight": "norm, bias or other vector",
        "model.layers.*.post_attention_layernorm.weight": "norm, bias or other vector",
        "model.layers.*.self_attn.q_norm.weight": "norm, bias or other vector",
        "model.layers.*.self_attn.k_norm.weight": "norm, bias or other vector",
        "model.layers.*.self_attn.k_proj.weight": "skipped as asked (*.k_proj)",
        "model.layers.*.mlp.gate.weight": "router",
    }


def test_strict_stops_where_a_product_is_overlooked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("opt", word_embed_proj_dim=16)  # it projects embeddings up and down, outside the blocks
    values = {"weights": "int8-row", "quantizer": "rtn"}
    reason = "a matrix product outside the blocks"
    plan, _, _ = plan_run(model, build_method(make_recipe(values)))
    assert {name for name, why in plan.kept.items() if why == reason} == {
        "model.decoder.project_in.weight",
        "model.decoder.project_out.weight",
    }
    with pytest.raises(UsageError, match=rf"project_out\.weight, .*project_in\.weight: {reason}.*--strict.*--skip"):
        quantize_directory(model, tmp_path / "out", make_recipe(values), strict=True, proof=Proof(tokens=0))
    assert not (tmp_path / "out").exists()
    skipped = make_recipe(values | {"skip": ["*.project_*"]})
    report = quantize_directory(model, tmp_path / "out", skipped, strict=True, proof=Proof(tokens=0))
    assert report["kept"]["model.decoder.project_in.weight"] == "skipped as asked (*.project_*)"


def test_a_record_says_that_experts_are_flat_only_where_they_are() -> None:
    spec = {"shape": [8, 4]}
    plain = WeightRecord(spec=spec, transposed=True, experts=2)
    assert "flat" not in plain.model_dump()
    assert plain.parameter("w").parameter_shape == (2, 4, 4)
    flat = WeightRecord.model_validate_json(json.dumps(plain.model_dump() | {"flat": True}))
    assert flat.model_dump()["flat"] is True
    assert flat.parameter("w").parameter_shape == (8, 4)
    w = torch.arange(32.0).reshape(8, 4)
    parameter = flat.parameter("w")
    assert torch.equal(parameter.restore(torch.cat(parameter.matrices(w))), w)
    with pytest.raises(CheckpointError, match=r"w: only experts can lie below each other"):
        WeightRecord(spec=spec, transposed=False, experts=0, flat=True).parameter("w")
