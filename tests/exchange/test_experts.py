"""Mixtures of experts in and out: one stack here, one layer an expert in most tools."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import UsageError
from bitpress.exchange.gguf import GgufSource
from bitpress.exchange.gguf_metadata import find_architecture
from bitpress.formats import CompressedLayer
from bitpress.pipeline.exporting import export_model
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe


@pytest.fixture(scope="module")
def mixtral(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 4 experts in int4-g32."""
    out = tmp_path_factory.mktemp("mixtral") / "out"
    recipe = make_recipe({"weights": "int4-g32", "quantizer": "rtn", "transforms": []})
    quantize_directory(tiny_model("mixtral"), out, recipe, proof=Proof(tokens=0))
    return out


def test_decoded_experts_have_the_names_of_the_hub(mixtral: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = export_model(mixtral, tmp_path / "bf16", "bf16")
    held, original = load_file(tmp_path / "bf16" / "model.safetensors"), load_file(tiny_model("mixtral") / "model.safetensors")
    assert held.keys() == original.keys()
    stack = CompressedCheckpoint.open(mixtral).decode("model.layers.1.mlp.experts.gate_up_proj").bfloat16()
    for expert in range(4):
        for leaf, half in zip(("w1", "w3"), stack[expert].chunk(2), strict=True):
            assert torch.equal(held[f"model.layers.1.block_sparse_moe.experts.{expert}.{leaf}.weight"], half)
    assert done.reading.kl_mean is not None, "transformers reads them"


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")])
def test_stacks_leave_for_gguf_with_their_codes(
    kind: str, name: str, mixtral: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = mixtral
    if kind != "mixtral":
        model = tmp_path / "out"
        recipe = make_recipe({"weights": "q4_0", "quantizer": "rtn", "transforms": []})
        quantize_directory(tiny_model(kind, norm_topk_prob=True), model, recipe, proof=Proof(tokens=0))
    done = export_model(model, tmp_path / "m.gguf", "gguf")
    assert {fate.how for fate in done.fates.values()} == {"exact"}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert (router.shape.tolist(), router.tensor_type.name) == ([32, 4], "F32")
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q4_0"
    checkpoint, source = CompressedCheckpoint.open(model), GgufSource.open(tmp_path / "m.gguf")
    assert source.config["model_type"] == kind
    assert source.config["num_experts_per_tok"] == 2
    stack = checkpoint.decode("model.layers.1.mlp.experts.gate_up_proj")
    inner = stack.shape[1] // 2
    leaves = ("w1", "w3") if kind == "mixtral" else ("gate_proj", "up_proj")
    for expert in range(4):
        for i, leaf in enumerate(leaves):
            layer = source.read(f"model.layers.1.{name}.experts.{expert}.{leaf}.weight")
            assert isinstance(layer, CompressedLayer)
            assert torch.equal(layer.weight.dequantize(), stack[expert, i * inner : (i + 1) * inner])
        theirs = gguf.quants.dequantize(tensors["blk.1.ffn_gate_exps.weight"].data[expert], gguf.GGMLQuantizationType.Q4_0)
        assert torch.equal(torch.from_numpy(theirs), stack[expert, :inner])


def test_experts_that_gguf_does_not_hold_are_rounded_if_asked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe({"weights": "int3-g32-zero", "quantizer": "rtn", "transforms": []})
    quantize_directory(tiny_model("mixtral"), tmp_path / "out", recipe, proof=Proof(tokens=0))
    with pytest.raises(UsageError, match="int3-g32-zero is no type of GGUF"):
        export_model(tmp_path / "out", tmp_path / "m.gguf", "gguf")
    done = export_model(tmp_path / "out", tmp_path / "m.gguf", "gguf", requantize=True)
    fate = done.fates["model.layers.0.mlp.experts.down_proj"]
    assert fate.how == "rounded"
    assert 0 < done.added["model.layers.0.mlp.experts.down_proj"] < 0.1
    with pytest.raises(UsageError, match="it is a stack of experts, which this tool does not read compressed"):
        export_model(tmp_path / "out", tmp_path / "nf4", "bitsandbytes")


def test_mixtures_that_llama_cpp_computes_otherwise_are_refused() -> None:
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 40, "tie_word_embeddings": False, "eos_token_id": 1,
    }  # fmt: skip
    assert find_architecture({"model_type": "olmoe", **small}) == "olmoe"
    assert find_architecture({"model_type": "qwen3_moe", **small, "head_dim": 32, "norm_topk_prob": True}) == "qwen3moe"
    for kind, changes, text in (
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob is True, not False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, not True"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "some of its layers have no experts"),
        ("olmoe", {"clip_qkv": 8.0}, "are clipped"),
        ("olmoe", {"num_key_value_heads": 2}, "not as wide"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tied to its embeddings"),
    ):
        with pytest.raises(UsageError, match=text):
            find_architecture({"model_type": kind, **small, **changes})
