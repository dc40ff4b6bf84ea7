"""Side files: what is carried over, what is left behind and why, and what a manifest may list."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.checkpoints import side_files
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.side_files import CHAT_TEMPLATES, check_listed_name, find_side_files, listed_file, read_side_file
from bitpress.checkpoints.source import SIDE_FILES
from bitpress.errors import CheckpointError
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe

ROUNDING = {"weights": "int4-g32-zero", "quantizer": "rtn"}
CARRIED = {
    "preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "chat_template.json": b"{}",
    "tekken.json": b"{}",
    "spiece.model": b"\nx",
    "vocab.bpe": b"#version: 0.2\n",
    "qwen.tiktoken": b"IQ== 0\n",
    "LICENSE": b"Apache",
    "NOTICE": b"",
    "USE_POLICY.md": b"policy",
    "recipe.yaml": b"a: 1",
    "tokenizer.model.v3": b"\nx",
    f"{CHAT_TEMPLATES}/tool_use.jinja": b"{{ messages }}",
}
LEFT = {
    "modeling_x.py": (b"print()", "code"),
    "setup.SH": (b"#!/bin/sh", "code"),
    "NAMELESS": (b"#!/bin/sh", "code"),
    "program": (b"\x7fELF\x02", "code"),
    "pytorch_model.bin": (b"x", "pickled"),
    "training_args": (b"\x80\x04\x95", "pickled"),
    "optimizer.pt": (b"x", "pickled"),
    "tf_model.h5": (b"x", "weights"),
    "consolidated.safetensors": (b"x", "weights"),
    "model.Q4_0.gguf": (b"GGUF", "weights"),
    "pytorch_model.bin.index.json": (b"{}", "index"),
    "extra.zip": (b"x", "archive"),
    "extra": (b"PK\x03\x04", "archive"),
    "README.md": (b"# x", "own file"),
    "report.json": (b"{}", "own file"),
    "Config.JSON": (b"{}", "own file"),
    "adapter_config.json": (b"{}", "adapter"),
    "quantize_config.json": (b"{}", "other weights"),
    ".gitattributes": (b"x", "dot"),
    "back\\slash.json": (b"{}", "plain"),
    "onnx/model.json": (b"{}", "folder"),
    f"{CHAT_TEMPLATES}/run.py": (b"x", "chat template"),
}


def put(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(content)


def test_every_file_is_carried_over_or_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), source)
    before = set(os.listdir(source))
    for name, content in CARRIED.items():
        put(source, name, content)
    for name, (content, _) in LEFT.items():
        put(source, name, content)
    (source / "outside.txt").symlink_to("/etc/passwd")
    Path(os.fsdecode(bytes(source) + b"/\xff.txt")).write_bytes(b"no UTF-8")
    report = quantize_directory(source, out, make_recipe(ROUNDING), proof=Proof(tokens=0))
    for name, content in CARRIED.items():
        assert (out / name).read_bytes() == content, name
    why = {item["file"]: item["why"] for item in report["left_behind"]}
    assert why.pop("outside.txt").startswith("is a link out of")
    assert "plain" in why.pop("\\udcff.txt")
    assert set(why) == {name.split("/")[0] if name.startswith("onnx") else name for name in LEFT}
    for name, (_, reason) in LEFT.items():
        assert reason in why["onnx" if name.startswith("onnx") else name], name
    assert before - {"model.safetensors"} <= set(os.listdir(out))
    for name in CARRIED:
        assert name in CompressedCheckpoint.open(out).manifest.files
    assert all(item["file"] in (out / "README.md").read_text("utf-8") for item in report["left_behind"])


def test_several_chat_templates_come_back(tiny_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path) -> None:
    from copy import deepcopy

    from bitpress.checkpoints.tokenizer import load_tokenizer

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), source)
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(source)
    quantize_directory(source, out, make_recipe(ROUNDING), proof=Proof(tokens=0))
    assert load_tokenizer(out).chat_template == load_tokenizer(source).chat_template == {"default": "D", "tool_use": "T"}
    # A template of a model that is replaced goes with it.
    shutil.rmtree(source / CHAT_TEMPLATES)
    quantize_directory(source, out, make_recipe(ROUNDING | {"weights": "int8-row"}), proof=Proof(tokens=0), force=True)
    assert load_tokenizer(out).chat_template == "D"
    put(out, f"{CHAT_TEMPLATES}/more.jinja", b"M")
    with pytest.raises(CheckpointError, match=r"more\.jinja, which the manifest does not list"):
        CompressedCheckpoint.open(out)


def test_needed_files_are_not_left_behind_in_silence(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    (source / "tokenizer_config.json").rename(tmp_path / "away.json")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "away.json")
    with pytest.raises(CheckpointError, match="is a link out of"):
        plan_run(source, build_method(make_recipe(ROUNDING)))


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x" * 100)
    monkeypatch.setattr(side_files, "MAX_ALL_SIDE_BYTES", 250)
    found = find_side_files(tmp_path, (), ())
    assert (list(found.carried), found.nbytes) == (["a.txt", "b.txt"], 200)
    monkeypatch.setattr(side_files, "MAX_SIDE_BYTES", 99)
    assert next((item.file, "at most 99" in item.why) for item in find_side_files(tmp_path, (), ()).left) == ("a.txt", True)
    with pytest.raises(CheckpointError, match="cannot be carried over"):
        find_side_files(tmp_path, (), SIDE_FILES)


def test_a_mark_is_not_published(tmp_path: Path) -> None:
    for name in ("a.json", "a.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf{}")
    assert read_side_file(tmp_path / "a.json") == b"{}"
    assert read_side_file(tmp_path / "a.txt") == b"\xef\xbb\xbf{}"


@pytest.mark.parametrize(
    "name",
    ["../a.json", "a/b.json", f"{CHAT_TEMPLATES}/", f"{CHAT_TEMPLATES}/a/b.jinja", f"{CHAT_TEMPLATES}/..", "a.py", ".a", ""],
)
def test_names_that_no_manifest_may_list(name: str) -> None:
    with pytest.raises(CheckpointError):
        check_listed_name("x", name)


def test_templates_of_the_hub_are_links_into_its_blobs(tmp_path: Path) -> None:
    blob = tmp_path / "models--o--n" / "blobs" / ("a" * 40)
    root = tmp_path / "models--o--n" / "snapshots" / "main"
    for folder in (blob.parent, root / CHAT_TEMPLATES):
        folder.mkdir(parents=True)
    blob.write_text("T")
    (root / CHAT_TEMPLATES / "a.jinja").symlink_to(f"../../../blobs/{blob.name}")
    (root / CHAT_TEMPLATES / "b.jinja").symlink_to(blob)
    assert listed_file(root, f"{CHAT_TEMPLATES}/a.jinja").read_text() == "T"
    with pytest.raises(CheckpointError, match="is a link out of"):
        listed_file(root, f"{CHAT_TEMPLATES}/b.jinja")


def test_older_directories_still_load(pressed_dir: Path) -> None:
    manifest = json.loads((pressed_dir / "bitpress.json").read_text())
    (pressed_dir / "preprocessor_config.json").write_text("{}")  # put there by hand
    assert "preprocessor_config.json" not in manifest["files"]
    CompressedCheckpoint.open(pressed_dir)
