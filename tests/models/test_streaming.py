"""Streaming against the whole model, for every architecture that is promised: blocks one by one, pressed and not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from walking import compress_blocks

from bitpress.calibration import Capture, Observed
from bitpress.errors import CalibrationError, CheckpointError
from bitpress.formats import CompressedWeight
from bitpress.formats.digest import digest
from bitpress.models.linears import list_weights
from bitpress.models.opening import open_original
from bitpress.models.walk import Stream
from bitpress.pipeline.plan import make_plan
from bitpress.recipes import build_method, make_recipe

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 8, "sliding_window": 8, "layer_types": SLIDING}),
    "phi3": ("Phi3Config", {**SMALL, "original_max_position_embeddings": 64}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 128,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixtral": ("MixtralConfig", {**SMALL, **MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SMALL, **MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
}


def build(name: str) -> Any:
    import transformers

    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    model.save_pretrained(path)
    return request.param, path, model


TOKENS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))


def test_streamed_logits_are_the_models_own(case: tuple[str, Path, Any]) -> None:
    _, path, whole = case
    model, _ = open_original(path, torch.float32)
    model.load_outer_()
    hidden = model.embed(TOKENS)
    for i in range(len(model.blocks)):
        model.load_block_(i)
        hidden = model.run_block(i, hidden)
        model.drop_block_(i)
        assert all(p.is_meta for p in model.blocks[i].parameters())
    with torch.no_grad():
        assert torch.equal(model.outputs(TOKENS, hidden), whole(TOKENS).logits)


def test_siblings_share_one_input_and_every_weight_is_seen(case: tuple[str, Path, Any]) -> None:
    name, path, _ = case
    model, _ = open_original(path, torch.float32)
    model.load_outer_()
    hidden = model.embed(TOKENS)
    model.load_block_(0)
    weights, kept = list_weights(model, 0, ())
    observed = []
    for weight in weights:
        live = model.model.get_parameter(weight.name)
        views = zip(weight.parts(), weight.views(live), strict=True)
        observed += [Observed(part, view, not weight.transposed) for part, view in views]
    capture = Capture(observed, {"gram"})
    with capture:
        model.run_block(0, hidden)
    groups = [{n.split(".")[-1] for n in group} for group in capture.groups()]
    stats = capture.finish()
    assert set(stats) == {w.name for w in observed} or name in ("mixtral", "qwen3_moe")
    if name in ("llama", "qwen2", "qwen3", "mistral", "gemma3"):
        assert groups == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    if name in ("mixtral", "qwen3_moe"):
        assert [reason for weight, reason in kept.items() if "gate" in weight]
        routed = sum(s.tokens for n, s in stats.items() if "gate_up_proj" in n)
        assert routed == TOKENS.numel() * 2  # two experts a token
    for s in stats.values():
        gram = s.need_gram(name)
        assert torch.equal(gram, gram.T)
        assert float(gram.diagonal().min()) >= 0


@pytest.mark.parametrize("quantizer", ["gptq", "awq"])
def test_a_pressed_model_is_the_original_with_decoded_weights(case: tuple[str, Path, Any], quantizer: str) -> None:
    name, path, _ = case
    recipe = make_recipe({"weights": "int4-g16-zero", "quantizer": quantizer, "compute": "fp32", "min_expert_tokens": 1})
    model, _ = open_original(path, torch.float32)
    plan = make_plan(model, build_method(recipe), {})
    outer = model.load_outer_()
    values, stream = dict(outer), Stream(model, [TOKENS])
    stream.start_()
    for i, block in enumerate(compress_blocks(model, build_method(recipe), TOKENS, [stream])):
        record, tensors = block.record(), block.tensors()
        stored = {n: t for n, t in tensors.items() if n in model.model.state_dict()}
        values |= stored
        for planned in (p for p in plan.weights if p.block == i):
            parameter = planned.parameter
            prefix = parameter.stem + "."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and n not in stored}
            weight = CompressedWeight.build(record.weights[parameter.name].spec, own)
            assert digest(weight.dequantize()) == record.digests[parameter.name]
            values[parameter.name] = parameter.restore(weight.dequantize())
    ours = model.outputs(TOKENS, stream.states[0])
    other = build(name)
    missing, unexpected = other.load_state_dict(values, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    with torch.no_grad():
        assert torch.equal(ours, other(TOKENS).logits)


def test_a_layer_that_calibration_never_reached_is_named(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    streamed, _ = open_original(tmp_path, torch.float32)
    recipe = make_recipe({"weights": "int4-g16", "min_expert_tokens": 1000, "compute": "fp32"})
    streamed.load_outer_()
    rows = compress_blocks(streamed, build_method(recipe), TOKENS)[0].record().rows
    told = [text for row in rows for text in row.fallbacks]
    assert len(told) == 8  # four experts, two weights each
    assert all("calibration tokens, fewer than 1000" in text for text in told)
    with pytest.raises(CalibrationError, match="no calibration text"):
        compress_blocks(streamed, build_method(recipe), None)


def test_a_tensor_that_belongs_nowhere_or_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {**tensors, "model.layers.0.self_attn.extra.weight": torch.zeros(2, 2)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"extra\.weight' of the checkpoint belongs to no parameter"):
        open_original(tmp_path, torch.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        open_original(tmp_path, torch.float32)


def test_a_tied_copy_must_be_equal(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build("qwen2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, loader = open_original(tmp_path, torch.float32)
    assert loader.names.left_out == ("lm_head.weight",)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is tied to"):
        open_original(tmp_path, torch.float32)
