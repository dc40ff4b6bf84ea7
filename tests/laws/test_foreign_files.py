"""The law of foreign files: a model whose files hold odd but legal values is quantized, verified, loaded and run, and so is its copy.

Every value here is one that transformers writes, or that Python's reader of JSON takes; all of them stand in one checkpoint.
"""

import codecs
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints.jsonfile import MAX_FOREIGN_JSON_DEPTH, parse_foreign_json, parse_json
from bitpress.checkpoints.source import decode_floats, encode_config, read_config
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.errors import BitpressError, CheckpointError
from bitpress.models.skeleton import build_config
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe

ROUNDING = {"weights": "int4-g32-zero", "quantizer": "rtn"}
DEEP = "[" * 100 + "]" * 100
ODD = [  # JSON text, and what it is read as
    ("1000000000000000019884624838656", 1000000000000000019884624838656),  # int(1e30): a length that is not known
    ("-" + "9" * 60, 1 - 10**60),
    ("1" * 5000, math.inf),
    ("1e30", 1e30),
    ("1e400", math.inf),
    ("Infinity", math.inf),
    ("[0.0, -Infinity]", [0.0, -math.inf]),
    ('{"__float__": "Infinity"}', {"__float__": "Infinity"}),
    ('"\\ud800"', "\ud800"),
    ('{"a": 1, "a": 2}', {"a": 2}),
    (DEEP, json.loads(DEEP)),
    ('"' + "x" * 2**16 + '"', "x" * 2**16),
]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
@pytest.mark.parametrize(("text", "value"), ODD, ids=range(len(ODD)))
def test_foreign_values_are_read(text: str, value: Any, mark: bytes) -> None:
    assert parse_foreign_json(mark + b'{"k": ' + text.encode() + b"}", "x") == {"k": value}


def test_what_a_foreign_reader_still_refuses() -> None:
    for data, rule in (
        (b"[" * (MAX_FOREIGN_JSON_DEPTH + 1) + b"]" * (MAX_FOREIGN_JSON_DEPTH + 1), "deeper than 128"),
        (b'{"a": 1,}', "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"", "not JSON"),
    ):
        with pytest.raises(CheckpointError, match=rule):
            parse_foreign_json(data, "x")


def test_special_numbers_come_back_from_a_configuration_that_any_reader_takes(tmp_path: Path) -> None:
    values = {"model_type": "llama", "limits": [0.0, math.inf], "deep": {"low": -math.inf, "none": math.nan}}
    data = encode_config(values)
    parse_json(data, "x")  # strictly
    (tmp_path / "config.json").write_bytes(data)
    assert encode_config(read_config(tmp_path)) == data
    assert read_config(tmp_path)["limits"] == [0.0, math.inf]
    assert math.isnan(read_config(tmp_path)["deep"]["none"])


@pytest.fixture(scope="module")
def odd(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose configuration, tokenizer and generation settings hold every odd value, one of the files with a mark."""
    root = tmp_path_factory.mktemp("odd") / "llama"
    shutil.copytree(tiny_model("llama"), root)
    odd = [(i, text) for i, (text, _) in enumerate(ODD) if len(text) != 5000]  # which transformers itself does not read
    keys = ", ".join(f'"odd_{i}": {text}' for i, text in odd)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (root / name).read_text("utf-8").rstrip().removesuffix("}").rstrip().replace(": 256", f": {10**30}")
        (root / name).write_text(f'{text}, {keys}, "max_length": 10, "max_length": {10**30}}}', "utf-8")
    (root / "tokenizer_config.json").write_bytes(codecs.BOM_UTF8 + (root / "tokenizer_config.json").read_bytes())
    return root


@pytest.fixture(scope="module")
def published(odd: Path, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("odd") / "out"
    quantize_directory(odd, out, make_recipe(ROUNDING), proof=Proof(tokens=64, length=32, text=str(text_file)))
    return out


def test_the_copy_loads_in_every_way(odd: Path, published: Path) -> None:
    import bitpress
    from bitpress.cli.reports import verify_directory

    assert verify_directory(published)["weights"] > 0
    for root in (odd, published):
        assert load_tokenizer(root).model_max_length == 10**30
    config = json.loads((published / "config.json").read_text())
    assert config["odd_5"] == config["odd_7"] == {"__float__": "Infinity"}
    tokens = torch.arange(2, 12)[None]
    assert bool(torch.isfinite(bitpress.load(published)(tokens).logits).all())
    assert bitpress.load(published, runtime="native").complete("some text", max_tokens=2, raw=True).tokens > 0


def test_the_layout_is_kept_and_read_again(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitpress
    from bitpress.runtime.native import assemble
    from bitpress.runtime.opening import OpenedModel

    monkeypatch.setenv("BITPRESS_LAYOUTS", str(tmp_path / "layouts"))
    bitpress.load(published, runtime="native")
    model = OpenedModel(published)
    assert model.has_layout()
    monkeypatch.setattr(assemble, "lay_out_directory", None)
    model.load_native()


def test_published_settings_are_ours_and_strict(published: Path, tmp_path: Path) -> None:
    from bitpress.checkpoints.compressed import CompressedCheckpoint

    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    manifest = json.loads((copy / "bitpress.json").read_text())
    (copy / "bitpress.json").write_text(json.dumps(manifest | {"job": {"a": 10**30}}))
    with pytest.raises(CheckpointError, match="31 digits"):
        CompressedCheckpoint.open(copy)


def test_large_index_and_more_keys_in_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from bitpress.checkpoints.directory import INDEX_NAME
    from bitpress.checkpoints.source import SourceCheckpoint

    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    names = list(SourceCheckpoint.open(source).tensors)
    (source / "model.safetensors").rename(source / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors"), "made_by": "someone", "metadata": {"total_size": 10**30}}
    (source / INDEX_NAME).write_text(json.dumps(index) + " " * (17 * 2**20))
    assert set(SourceCheckpoint.open(source).tensors) == set(names)


@pytest.mark.parametrize("spelled", ["Infinity", '{"__float__": "Infinity"}'])
def test_both_spellings_of_infinity_make_a_hybrid(spelled: str) -> None:
    text = f'{{"model_type": "mamba2", "num_heads": 8, "head_dim": 16, "hidden_size": 64, "time_step_limit": [0.0, {spelled}]}}'
    values = parse_foreign_json(text.encode(), "x")
    assert build_config(decode_floats(values)).time_step_limit[1] == math.inf


# What is refused is refused before any work: by the plan, in one line, with exit code 3.


def spoil(root: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(root / "model.safetensors")
    change(held)
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})


Q, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "dtype", "shown"),
    [
        (Q, torch.int8, "I8"),
        (Q, torch.float8_e4m3fn, "F8_E4M3"),
        (Q, torch.uint8, "U8"),
        (NORM, torch.bool, "BOOL"),
        (NORM, torch.complex64, "C64"),
        (EMBEDDING, torch.int32, "I32"),
    ],
)
def test_types_are_checked_before_work(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str, dtype: torch.dtype, shown: str
) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    spoil(root, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{name}.* is {shown} \[") as caught:
        plan_run(root, build_method(make_recipe(ROUNDING)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_floating_type_is_taken(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    root, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model(architecture), root)
    spoil(root, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    quantize_directory(root, out, make_recipe(ROUNDING), proof=Proof(tokens=0))
    assert (out / "bitpress.json").exists()


def test_experts_are_checked_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("mixtral"), root)

    def change(held: dict[str, torch.Tensor]) -> None:
        name = next(name for name in held if "experts" in name)
        held[name] = held[name].to(torch.int8)

    spoil(root, change)
    with pytest.raises(CheckpointError, match=r"experts.* is I8"):
        plan_run(root, build_method(make_recipe(ROUNDING)))


def test_tied_copies_may_differ_in_type_but_not_in_value(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama", tie_word_embeddings=True, dtype="bfloat16"), root)
    spoil(root, lambda t: t.update({"lm_head.weight": t[EMBEDDING].float()}))
    plan_run(root, build_method(make_recipe(ROUNDING)))
    spoil(root, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="holds other values"):
        plan_run(root, build_method(make_recipe(ROUNDING)))


def test_scales_of_another_tool_say_that_the_model_is_quantized(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    spoil(root, lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(CheckpointError, match=r"weight_scale_inv.*quantized already"):
        plan_run(root, build_method(make_recipe(ROUNDING)))


def test_a_known_model_that_needs_code_says_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    config = json.loads((root / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (root / "config.json").write_text(json.dumps(config))
    plan_run(root, build_method(make_recipe(ROUNDING)))  # the code may be of no consequence
    spoil(root, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"extra.*code of its own .auto_map., which is never run"):
        plan_run(root, build_method(make_recipe(ROUNDING)))


@pytest.mark.parametrize(
    ("values", "text", "code"),
    [
        ({"model_type": "mymodel", "auto_map": {"AutoConfig": "configuration_mymodel.My"}}, "needs code that comes with", 3),
        ({"model_type": "lama"}, "Did you mean 'llama'", 2),
        ({"model_type": "zzzzzzzzzz"}, "no such architecture", 2),
    ],
)
def test_unknown_models_are_told_in_one_short_line(values: dict[str, Any], text: str, code: int) -> None:
    with pytest.raises(BitpressError, match=text) as caught:
        build_config(values)
    assert caught.value.exit_code == code
    assert len(str(caught.value)) < 300


def test_what_would_fail_at_the_end_fails_at_the_beginning(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    for i, (name, content, tokens) in enumerate(
        (("tokenizer.json", "{", 64), ("tokenizer_config.json", "[]", 64), ("generation_config.json", "[]", 0))
    ):
        root, out = tmp_path / f"model{i}", tmp_path / f"out{i}"
        shutil.copytree(tiny_model("llama"), root)
        (root / name).write_text(content)
        with pytest.raises(CheckpointError):
            quantize_directory(root, out, make_recipe(ROUNDING), proof=Proof(tokens=tokens, length=32, text=str(text_file)))
        assert not out.exists()


def test_a_type_that_is_auto_says_nothing() -> None:
    for key in ("dtype", "torch_dtype"):
        assert build_config({"model_type": "llama", key: "auto"}).dtype is None
