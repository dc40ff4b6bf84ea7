"""Mixtures of experts in and out: one stack here, one layer an expert in most tools."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.hub_names import Piece
from bitpress.errors import CheckpointError, FormatError, NumericsError, UsageError
from bitpress.exchange.expert_names import fold_experts
from bitpress.exchange.gguf import GgufSource
from bitpress.exchange.gguf_metadata import find_architecture
from bitpress.exchange.pieces import cut_layer, join_layers
from bitpress.exchange.table import open_source
from bitpress.formats import CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.formats.maps.map import Permutation
from bitpress.pipeline import foreign_check
from bitpress.pipeline.exporting import export_model, open_model
from bitpress.pipeline.foreign_check import read_by_others
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_recipe

STACK = "model.layers.0.mlp.experts.gate_up_proj"


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def same_weights(first: Path, second: Path) -> None:
    """Check that two models hold the same tensors of the same specifications."""
    before, after = CompressedCheckpoint.open(first), CompressedCheckpoint.open(second)
    assert before.manifest.weights.keys() == after.manifest.weights.keys()
    for name, record in before.manifest.weights.items():
        again = after.manifest.weights[name]
        assert (record.spec, record.experts) == (again.spec, again.experts), name
        one, other = before.read_weight(name).tensors(), after.read_weight(name).tensors()
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[leaf]) for leaf, value in one.items()), name


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


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "gptq", "mlx"])
def test_stacks_leave_expert_by_expert_and_come_back(
    to: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    notes = Notes()
    done = export_model(mixtral, tmp_path / "out", to)
    assert {fate.how for fate in done.fates.values()} == {"exact"}
    held = load_file(tmp_path / "out" / "model.safetensors")
    block = "model.layers.1.block_sparse_moe"
    assert f"{block}.gate.weight" in held
    if to == "mlx":
        assert held[f"{block}.switch_mlp.up_proj.scales"].shape == (4, 64, 1)
        assert not any(".experts." in name for name in held)
    else:
        leaf = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}[to]
        assert sum(name.endswith(leaf) and ".experts." in name for name in held) == 2 * 4 * 3
    same_weights(mixtral, open_model(tmp_path / "out", notes))
    assert len(notes.told) == 1, "nothing is decoded"


MIXED = {
    "weights": "int4-g32",
    "quantizer": "rtn",
    "transforms": [],
    "overrides": [{"match": "*.0.mlp.experts.down_proj", "weights": "int8-g32"}],
    "skip": ["*.1.mlp.experts.*"],
}


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "mlx"])
def test_experts_of_several_formats_and_plain_ones_are_told_in_few_words(
    to: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    quantize_directory(tiny_model("mixtral"), tmp_path / "in", make_recipe(MIXED), proof=Proof(tokens=0))
    export_model(tmp_path / "in", tmp_path / "out", to)
    same_weights(tmp_path / "in", open_model(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if to == "mlx":
        assert settings["model.layers.0.block_sparse_moe.switch_mlp.down_proj"]["bits"] == 8
        assert "model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight" in load_file(
            tmp_path / "out" / "model.safetensors"
        )
        return
    told: list[str] = []
    if to == "gptq":
        told = list(settings["dynamic"])
        assert settings["dynamic"][r"+:^model\.layers\.0\.block_sparse_moe\.experts\.[0-9]+\.(w2)$"] == {"bits": 8}
        assert r"-:^model\.layers\.1\.block_sparse_moe\.experts(\.|$)" in told
    else:
        groups = {group["weights"]["num_bits"]: group["targets"] for group in settings["config_groups"].values()}
        assert groups[8] == [r"re:^model\.layers\.0\.block_sparse_moe\.experts\.[0-9]+\.(w2)$"]
        assert r"re:^model\.layers\.0\.block_sparse_moe\.experts\.[0-9]+\.(w1|w3)$" in groups[4]
        assert r"re:^model\.layers\.1\.block_sparse_moe\.experts(\.|$)" in settings["ignore"]
        told = [*settings["ignore"], *groups[4], *groups[8]]
    assert not any("experts.3" in name for name in told)


def test_what_transformers_does_not_read_of_experts_is_not_asked_of_it(
    mixtral: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_check, "PACKAGES", {"compressed-tensors": ("torch",), "gptq": ("torch",)})
    zeros = {"weights": "int4-g32-zero", "quantizer": "rtn", "transforms": []}
    for i, recipe in enumerate((MIXED, zeros)):
        quantize_directory(tiny_model("mixtral"), tmp_path / str(i), make_recipe(recipe), proof=Proof(tokens=0))
        reading = read_by_others(tmp_path / str(i), tmp_path, "compressed-tensors", Silent())
        assert reading.why == "transformers reads experts of one format for all, of integers without zero points"
    assert (
        read_by_others(mixtral, tmp_path, "gptq", Silent()).why == "transformers' reader of gptq is not known to take experts"
    )
    with pytest.raises(NumericsError, match="does not open the export"):
        read_by_others(mixtral, tmp_path, "compressed-tensors", Silent())


def test_patterns_say_their_own_experts_alone() -> None:
    def layers(block: int, *leaves: str) -> list[str]:
        return [f"model.layers.{block}.mlp.experts.{e}.{leaf}" for e in range(12) for leaf in leaves]

    chosen = [*layers(1, "up"), *layers(2, "up", "down"), "model.layers.1.mlp.gate"]
    others = [*layers(1, "down"), *layers(12, "up"), "model.layers.2.mlp.shared_expert.up"]
    names, patterns = fold_experts(chosen, others)
    assert names == ["model.layers.1.mlp.gate"]
    assert len(patterns) == 2
    for layer in chosen[:-1]:
        assert any(re.match(pattern, layer) for pattern in patterns)
    for layer in others:
        assert not any(re.match(pattern, layer) for pattern in patterns)
    assert any(re.match(pattern, "model.layers.2.mlp.experts") for pattern in patterns)
    assert fold_experts(layers(0, "up")[:3], layers(0, "up")[3:]) == (layers(0, "up")[:3], [])


def test_experts_of_several_formats_are_decoded_with_a_line(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    export_model(mixtral, tmp_path / "out", "gptq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w3.qzeros"] += 1  # one of eight zero points in each word
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    notes = Notes()
    taken = CompressedCheckpoint.open(open_model(tmp_path / "out", notes))
    assert notes.told[-1].startswith(f"1 stacks of experts are decoded, the first is {STACK}: only terms of one format")
    assert "model.layers.0.mlp.experts.down_proj" in taken.manifest.weights
    values, original = taken.read(STACK), CompressedCheckpoint.open(mixtral).decode(STACK)
    assert isinstance(values, torch.Tensor)
    assert torch.equal(values[[0, 1, 3]], original[[0, 1, 3]])
    assert not torch.equal(values[2, 64:], original[2, 64:])


def some_layer(rows: int, width: int, seed: int, name: str = "int3-g5-zero", order: bool = False) -> CompressedLayer:
    numbers, fmt = torch.Generator().manual_seed(seed), parse_format(name)
    w = torch.randn(rows, width, generator=numbers)
    params = fmt.fit(w)
    change = Permutation.of(torch.randperm(width, generator=numbers)) if order else None
    return CompressedLayer(CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),), change))


def test_pieces_of_odd_shapes_join_and_part_again() -> None:
    parts = [some_layer(7, 15, seed) for seed in range(6)]
    whole = join_layers(parts, 3)
    assert whole.weight.shape == (42, 15)
    for i, part in enumerate(parts):
        again = cut_layer(whole, Piece(str(i), (7, 15), 7 * i, 7 * i + 7))
        assert again.weight.spec() == part.weight.spec()
        assert all(torch.equal(value, again.weight.tensors()[name]) for name, value in part.weight.tensors().items())


def test_each_expert_may_take_its_inputs_in_its_own_order() -> None:
    parts = [some_layer(5, 15, expert, order=True) for expert in (0, 0, 1, 1, 2, 2)]
    whole = join_layers(parts, 3)
    assert whole.weight.parts == 3
    assert torch.equal(whole.weight.dequantize(), torch.cat([part.weight.dequantize() for part in parts]))
    again = cut_layer(whole, Piece("up", (5, 15), 15, 20))
    assert torch.equal(again.weight.dequantize(), parts[3].weight.dequantize())
    with pytest.raises(FormatError, match="in different orders"):
        join_layers([some_layer(5, 15, seed, order=True) for seed in range(6)], 3)
    with pytest.raises(FormatError, match="one format"):
        join_layers([some_layer(5, 15, 0), some_layer(5, 15, 0, "int4-g5-zero")], 1)


def test_a_damaged_stack_is_refused(mixtral: Path, tmp_path: Path) -> None:
    export_model(mixtral, tmp_path / "out", "mlx")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stack = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"

    def check(changes: dict[str, torch.Tensor | None], text: str) -> None:
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "out", bad)
        held: dict[str, Any] = {name: value for name, value in (tensors | changes).items() if value is not None}
        save_file(held, bad / "model.safetensors")
        with pytest.raises(CheckpointError, match=text):
            open_model(bad)
        shutil.rmtree(bad)

    check({f"{stack}.scales": tensors[f"{stack}.scales"][:3].clone()}, "not those of one number of experts")
    check({f"{stack}.scales": tensors[f"{stack}.scales"][0].clone()}, "not those of one number of experts")
    check({f"{stack}.scales": None}, "belongs to no parameter|is U32")
    lone = "model.layers.0.block_sparse_moe.experts.1.w3"
    both = {f"{lone}.{leaf}": tensors[f"{stack}.{leaf}"][1].clone() for leaf in ("weight", "scales", "biases")}
    check(both, "both alone and with the other experts")
    source = open_source(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no"):
        source.read("model.layers.0.block_sparse_moe.experts.4.w3.weight")


def test_a_runtime_gets_one_format_for_all_experts_of_a_block(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("mixtral", intermediate_size=48)
    report = bitpress.quantize(model, tmp_path / "out", runtime="vllm", quantizer="rtn", proof_tokens=0)
    assert report["exported"]["weights"] == {"exact": 12}
    weights = CompressedCheckpoint.open(tmp_path / "out").manifest.weights
    formats = {name.rpartition(".")[2]: record.spec["terms"][0]["format"] for name, record in weights.items() if record.experts}
    assert formats == {"gate_up_proj": "int4-row", "down_proj": "int4-row"}, "48 inputs are no whole groups of 32"
    rules = [{"match": "*.0.mlp.experts.down_proj", "weights": "int8-row"}]
    recipe = {"weights": "int4-row", "quantizer": "rtn", "transforms": [], "overrides": rules}
    with pytest.raises(
        UsageError, match=r"all experts of a block: model\.layers\.0\.mlp\.experts\.gate_up_proj has .*\.down_proj has"
    ):
        bitpress.quantize(model, tmp_path / "other", recipe=recipe, runtime="vllm", proof_tokens=0)


def test_transformers_gets_one_format_for_all_experts(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    recipe: dict[str, Any] = {"weights": "int4-g32", "quantizer": "rtn", "transforms": []}
    rules = [{"match": "*.0.mlp.experts.*", "weights": "int8-g32"}]
    with pytest.raises(UsageError, match=r"all experts of a model: model\.layers\.0\.mlp\.experts.* and model\.layers\.1"):
        bitpress.quantize(model, tmp_path / "out", recipe=recipe | {"overrides": rules}, runtime="transformers", proof_tokens=0)
    recipe |= {"skip": ["*.1.mlp.experts.*"]}
    with pytest.raises(UsageError, match=r"transformers cannot load model\.layers\.1\.mlp\.experts.* in 16 bits"):
        bitpress.quantize(model, tmp_path / "out", recipe=recipe, runtime="transformers", proof_tokens=0)
    assert not (tmp_path / "out").exists()
