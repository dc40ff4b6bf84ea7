"""Tokenizers that need a package say which, before anything else is done."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitpress.checkpoints import tokenizer
from bitpress.checkpoints.tokenizer import check_tokenizer, load_tokenizer
from bitpress.errors import CheckpointError
from bitpress.pipeline.quantize import plan_run
from bitpress.recipes import build_method, make_recipe


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "pip install sentencepiece protobuf"),
        ("spiece.model", b"\n\x0e\n\x05<unk>", "pip install sentencepiece protobuf"),
        ("tokenizer.model", b"IQ== 0\n", "pip install tiktoken"),
        ("qwen.tiktoken", b"IQ== 0\n", "pip install tiktoken"),
    ],
)
def test_a_missing_package_is_named_before_work(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, command: str
) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    (root / name).write_bytes(content)
    monkeypatch.setattr(tokenizer, "_is_here", lambda package: False)
    load_tokenizer(root)  # nothing more is needed beside a tokenizer.json
    (root / "tokenizer.json").unlink()
    for check in (
        lambda: check_tokenizer(root),
        lambda: load_tokenizer(root),
        lambda: plan_run(root, build_method(make_recipe({"weights": "int4-g32-zero", "quantizer": "gptq"}))),
    ):
        with pytest.raises(CheckpointError, match=command) as caught:
            check()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_packages_are_looked_for_without_being_loaded() -> None:
    assert tokenizer._is_here("json")
    assert not tokenizer._is_here("no_such_package.inside")


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is None, reason="sentencepiece is not installed")
def test_a_sentencepiece_model_alone_is_a_tokenizer(tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    import sentencepiece

    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    (root / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file), model_prefix=str(root / "tokenizer"), vocab_size=300, model_type="bpe", minloglevel=2
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(load_tokenizer(root)("the first words")["input_ids"]) > 2


def test_code_for_something_else_than_the_tokenizer_does_not_matter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    path = root / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for code in ({"AutoProcessor": "processing_x.X"}, {}):
        path.write_text(json.dumps(settings | {"auto_map": code}))
        load_tokenizer(root)
    for code in ({"AutoTokenizer": "x.X"}, ["x.X", None]):
        path.write_text(json.dumps(settings | {"auto_map": code}))
        with pytest.raises(CheckpointError, match="comes as code"):
            load_tokenizer(root)


def test_links_out_of_the_directory_are_not_followed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), root)
    (tmp_path / "away.jinja").write_text("T")
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "away.jinja")
    with pytest.raises(CheckpointError, match="is a link out of"):
        load_tokenizer(root)
