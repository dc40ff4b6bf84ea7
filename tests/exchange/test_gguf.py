"""GGUF in and out: codes, names, order of rows, split files, tokenizers, and files that are refused."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import write_llama

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import BitpressError, CheckpointError, UsageError
from bitpress.exchange.gguf import Gguf, GgufSource
from bitpress.exchange.gguf_metadata import find_architecture, frequency_tensors
from bitpress.exchange.gguf_names import ARCHITECTURES, order_from_pairs, order_to_pairs
from bitpress.formats import CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.pipeline.exporting import export_model, open_model
from bitpress.pipeline.quantize import quantize_directory
from bitpress.recipes import build_method, make_recipe


def decoded(raw: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))


def test_codes_are_read_with_rows_in_the_order_of_transformers(tmp_path: Path) -> None:
    made = write_llama(tmp_path / "m.gguf")
    source = GgufSource.open(tmp_path / "m.gguf")
    assert source.config["tie_word_embeddings"] is True
    assert source.config["vocab_size"] == 40
    value = source.read("model.layers.1.mlp.up_proj.weight")
    assert isinstance(value, CompressedLayer)
    assert value.weight.spec()["terms"][0]["format"] == parse_format("mxfp4").name
    assert torch.equal(value.weight.dequantize(), decoded(made["blk.1.ffn_up.weight"], "MXFP4"))
    for name, kind, heads in (("q", "Q4_0", 4), ("k", "Q4_1", 2)):
        layer = source.read(f"model.layers.0.self_attn.{name}_proj.weight")
        assert isinstance(layer, CompressedLayer)
        theirs = decoded(made[f"blk.0.attn_{name}.weight"], kind)
        assert torch.equal(layer.weight.dequantize(), theirs.view(heads, 8, 2, 64).transpose(1, 2).reshape(-1, 64))
    norm = source.read("model.norm.weight")
    assert isinstance(norm, torch.Tensor)
    assert torch.equal(norm, made["output_norm.weight"])
    with pytest.raises(CheckpointError, match="holds no 'nothing'"):
        source.read("nothing")


def test_orders_of_rows_undo_each_other() -> None:
    assert torch.equal(order_from_pairs(24, 3)[order_to_pairs(24, 3)], torch.arange(24))
    assert order_to_pairs(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_split_model_and_a_stack_of_experts_are_read(tmp_path: Path) -> None:
    made = write_llama(tmp_path / "m.gguf", experts=4, split=5)
    first = tmp_path / "m-00001-of-00005.gguf"
    source = GgufSource.open(first if first.exists() else sorted(tmp_path.glob("m-*.gguf"))[0])
    assert source.config["model_type"] == "mixtral"
    assert source.config["num_local_experts"] == 4
    stack = decoded(made["blk.1.ffn_down_exps.weight"], "Q8_0").view(4, 64, 128)
    for expert in range(4):
        layer = source.read(f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight")
        assert isinstance(layer, CompressedLayer)
        assert torch.equal(layer.weight.dequantize(), stack[expert])
    with pytest.raises(BitpressError):
        GgufSource.open(tmp_path / "m.gguf")


def test_a_file_without_a_tokenizer_says_so_and_its_weights_go_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    write_llama(tmp_path / "m.gguf", tokenizer="t5")
    problem = GgufSource.open(tmp_path / "m.gguf").tokenizer_problem
    assert problem is not None
    assert "m has a tokenizer of the kind 't5'" in problem
    result = export_model(tmp_path / "m.gguf", tmp_path / "plain", "bf16")
    assert (result.out / "model.safetensors").is_file()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        export_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize("weights", ["q4_0", "int4-g64", "int8-row"])
def test_a_model_goes_out_and_comes_back_with_its_codes(
    weights: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe({"weights": weights, "quantizer": "rtn", "transforms": []})
    model = tiny_model("llama")
    quantize_directory(model, tmp_path / "out", build_method(recipe))
    result = export_model(tmp_path / "out", tmp_path / "m.gguf", "gguf", requantize=True)
    before, after = CompressedCheckpoint.open(tmp_path / "out"), CompressedCheckpoint.open(open_model(tmp_path / "m.gguf"))
    for name, fate in result.fates.items():
        if fate.how == "exact":
            assert torch.equal(before.read_weight(name).dequantize(), after.read_weight(name).dequantize()), name
        else:
            assert 0 <= result.added[name] < 1
    assert {fate.how for fate in result.fates.values()} & {"exact"}
    again = export_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")
    assert {fate.how for fate in again.fates.values()} == {"exact"}
    first, second = (gguf.GGUFReader(tmp_path / name) for name in ("m.gguf", "again.gguf"))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data.tobytes()) == (b.name, b.tensor_type, b.data.tobytes())
    with pytest.raises(UsageError, match="exists already"):
        export_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")


def test_what_llama_cpp_does_not_compute_is_refused() -> None:
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40,
    }  # fmt: skip
    assert find_architecture({"model_type": "llama", **small}) == "llama"
    for kind, changes, text in (
        ("bloom", {}, "has no way to GGUF"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("mistral", {"sliding_window": 16}, "its attention has a window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "every fourth"),
    ):
        with pytest.raises(UsageError, match=text):
            find_architecture({"model_type": kind, **small, **changes})


def test_frequencies_of_llama_3_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    ours = frequency_tensors(config.to_dict())["rope_freqs.weight"]
    assert torch.allclose(plain / ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_lead_back(architecture: str) -> None:
    row = ARCHITECTURES[architecture]
    for tensor in row.names:
        name = f"{tensor.format(3)}.weight"
        ours = row.ours(name)
        assert ours is not None
        place = row.theirs(ours.replace("{e}", "5"))
        assert place is not None
        assert (place.tensor, place.expert) == (name, 5 if "{e}" in ours else None)
    assert row.ours("blk.00.attn_norm.weight") is None
    assert row.ours("nothing") is None


def test_layers_with_larger_groups_go_out_with_their_scales_repeated() -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    for name, kind in (("int4-g64", "Q4_0"), ("int8-row", "Q8_0"), ("int5-g128-min", "Q5_1")):
        fmt = parse_format(name)
        params = fmt.fit(w)
        layer = CompressedLayer(CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),)))
        stored = Gguf.write(layer)
        assert stored.entry == {"type": kind}
        assert torch.equal(Gguf.read(stored).weight.dequantize(), layer.weight.dequantize())
    for name in ("int3-g32", "int4-g32-zero", "int4-g32-bf16", "int4-8x16"):
        spec = {"shape": [8, 128], "terms": [{"kind": "packed", "format": name}], "input_map": None, "output_map": None}
        assert "is no type of GGUF" in str(Gguf.refuses(spec))


# ---- hostile files ----


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_llama(path, layers=1)
    return path.read_bytes()


def read_all(path: Path) -> None:
    source = GgufSource.open(path)
    for name in source.names:
        source.read(name)


def test_a_file_that_is_cut_short_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in (0, 3, 4, 8, 23, 24, 60, 200, 700, 1500, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BitpressError):
            read_all(path)


def test_numbers_of_the_header_that_are_absurd_are_refused_or_read(good: bytes, tmp_path: Path) -> None:
    """Every eighth place of the header holds a huge number once: a length, a count, an offset, a dimension or a type."""
    path = tmp_path / "m.gguf"
    end = good.index(b"blk.0.ffn_down.weight") + 60
    refused = 0
    for value in (2**64 - 1, 2**40):
        for at in range(4, end, 23):
            path.write_bytes(good[:at] + struct.pack("<Q", value) + good[at + 8 :])
            try:
                read_all(path)
            except BitpressError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"architecture": "bert"}, "architecture 'bert'"),
        ({"extra": ("blk.0.strange.weight",)}, "'blk.0.strange.weight' is no parameter"),
        ({"extra": ("output.scale",)}, "'output.scale' is no parameter"),
        ({"heads": 64, "kv": 64}, "64 rows are not those of 64 heads"),
        ({"heads": 5, "kv": 5}, "not a multiple of the number of attention heads"),
        ({"extra": ("rope_freqs.weight",)}, "scales rotations in another way"),
    ],
)
def test_what_is_no_model_here_is_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=text):
        read_all(tmp_path / "m.gguf")


def test_a_name_that_leads_nowhere_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert not Gguf.owns(tmp_path / "folder.gguf")
    shutil.rmtree(tmp_path / "folder.gguf")
