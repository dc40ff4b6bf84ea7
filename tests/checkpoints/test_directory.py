"""Model directories: names that lead outside, links that do, and indexes that lie."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints.directory import INDEX_NAME, SINGLE_NAME, open_directory, read_index, safe_file
from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.safetensors_file import serialize
from bitpress.errors import CheckpointError

BLOB = "0123456789abcdef" * 4


def write_weights(path: Path, *names: str) -> None:
    write_durably(path, serialize({name: torch.ones(2) for name in names}, None))


def write_index(root: Path, weight_map: Any, **others: Any) -> None:
    (root / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map, **others}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside.json").write_text("{}")
    root = tmp_path / "model"
    root.mkdir()
    return root


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The cache of the hub: a snapshot whose files are links to blobs."""
    cache = tmp_path / "hub" / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / BLOB).write_text("{}")
    (cache / "blobs" / BLOB[:40]).write_text("{}")
    snapshot = cache / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_directory_is_its_real_path(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    assert open_directory(root.parent / "link") == Path(os.path.realpath(root))
    assert open_directory(str(root / ".." / "model")) == Path(os.path.realpath(root))


@pytest.mark.parametrize("name", ["missing", "nul\0", "dangling"])
def test_a_missing_directory_says_what_a_model_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"MODEL is a directory that holds config\.json"):
        open_directory(tmp_path / name)


def test_a_file_is_no_directory(root: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        open_directory(root.parent / "outside.json")


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "merges.txt",
        "a.gguf",
        "README.md",
        "ä b.json",
    ],
)
def test_plain_allowed_names_are_opened(root: Path, name: str) -> None:
    (root / name).write_text("x")
    assert safe_file(root, name) == Path(os.path.realpath(root)) / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside.json",
        "sub/inside.json",
        "sub\\inside.json",
        "/etc/passwd.json",
        ".hidden.json",
        "..json",
        "nul\0.json",
        "line\n.json",
        "config.json\n",
        "\ud800.json",
        "a" * 251 + ".json",
        None,
        3,
    ],
)
def test_names_that_are_not_plain_are_refused(root: Path, name: Any) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "inside.json").write_text("{}")
    (root / ".hidden.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a plain file name"):
        safe_file(root, name)


@pytest.mark.parametrize(
    "name",
    [
        "modeling.py",
        "a.pkl",
        "pytorch_model.bin",
        "a.pt",
        "a.pth",
        "a.json.py",
        "json",
        "a.JSON",
        "LICENSE",
        "a.so",
        "other.md",
    ],
)
def test_names_that_are_not_listed_are_refused(root: Path, name: str) -> None:
    (root / name).write_text("x")
    with pytest.raises(CheckpointError, match="not a kind of file"):
        safe_file(root, name)


def test_what_is_not_a_regular_file_is_refused(root: Path) -> None:
    (root / "directory.json").mkdir()
    os.mkfifo(root / "pipe.json")
    (root / "device.json").symlink_to("/dev/zero")
    for name in ("directory.json", "pipe.json", "device.json"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            safe_file(root, name)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        safe_file(root, "missing.json")


def test_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "real.json").write_text("{}")
    (root / "link.json").symlink_to("sub/real.json")
    (root / "chain.json").symlink_to(root / "link.json")
    assert safe_file(root, "link.json").read_text() == "{}"
    assert safe_file(root, "chain.json").read_text() == "{}"


def test_links_out_of_the_root_are_refused(root: Path) -> None:
    (root / "relative.json").symlink_to("../outside.json")
    (root / "absolute.json").symlink_to(root.parent / "outside.json")
    (root / "chain.json").symlink_to("relative.json")
    (root / "directory").symlink_to("..")
    (root / "through.json").symlink_to("directory/outside.json")
    (root.parent / "model-sibling").mkdir()
    (root.parent / "model-sibling" / "a.json").write_text("{}")
    (root / "prefix.json").symlink_to("../model-sibling/a.json")
    for name in ("relative.json", "absolute.json", "chain.json", "through.json", "prefix.json"):
        with pytest.raises(CheckpointError, match="link out of"):
            safe_file(root, name)


def test_broken_links_and_loops_are_refused(root: Path) -> None:
    (root / "broken.json").symlink_to("missing.json")
    (root / "loop.json").symlink_to("loop.json")
    for name in ("broken.json", "loop.json"):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            safe_file(root, name)


def test_a_link_makes_no_forbidden_file_an_allowed_one(root: Path) -> None:
    (root / "pytorch_model.bin").write_text("pickle")
    (root / "config.json").symlink_to("pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a kind of file"):
        safe_file(root, "config.json")


def test_links_of_the_hub_cache_are_followed(snapshot: Path) -> None:
    (snapshot / "config.json").symlink_to(f"../../blobs/{BLOB}")
    (snapshot / "tokenizer.json").symlink_to(f"../../blobs/{BLOB[:40]}")
    assert safe_file(snapshot, "config.json").read_text() == "{}"
    assert safe_file(snapshot, "tokenizer.json").read_text() == "{}"


def test_links_that_only_resemble_the_hub_cache_are_refused(snapshot: Path, tmp_path: Path) -> None:
    cache = snapshot.parent.parent
    (tmp_path / "outside.json").write_text("{}")
    (cache / "blobs" / "short").write_text("{}")
    (cache / "blobs" / ("A" * 64)).write_text("{}")
    (cache / "blobs" / ("b" * 64)).symlink_to(tmp_path / "outside.json")
    (cache / "other").mkdir()
    (cache / "other" / BLOB).write_text("{}")
    targets = {
        "short.json": "../../blobs/short",
        "case.json": "../../blobs/" + "A" * 64,
        "linked.json": "../../blobs/" + "b" * 64,
        "other.json": f"../../other/{BLOB}",
        "absolute.json": str(cache / "blobs" / BLOB),
        "longer.json": f"../../../models--x--y/blobs/{BLOB}",
        "newline.json": f"../../blobs/{BLOB}\n",
    }
    (cache / "blobs" / f"{BLOB}\n").write_text("{}")
    for name, target in targets.items():
        (snapshot / name).symlink_to(target)
        with pytest.raises(CheckpointError, match="link out of"):
            safe_file(snapshot, name)


@pytest.mark.parametrize("parts", [("models--x--y", "other", "r"), ("datasets", "snapshots", "r")])
def test_hub_links_count_only_in_a_hub_cache(tmp_path: Path, parts: tuple[str, ...]) -> None:
    root = tmp_path.joinpath(*parts)
    root.mkdir(parents=True)
    (root.parent.parent / "blobs").mkdir()
    (root.parent.parent / "blobs" / BLOB).write_text("{}")
    (root / "config.json").symlink_to(f"../../blobs/{BLOB}")
    with pytest.raises(CheckpointError, match="link out of"):
        safe_file(root, "config.json")


def test_blobs_that_are_themselves_elsewhere_are_refused(snapshot: Path, tmp_path: Path) -> None:
    cache = snapshot.parent.parent
    (cache / "blobs").rename(tmp_path / "elsewhere")
    (cache / "blobs").symlink_to(tmp_path / "elsewhere")
    (snapshot / "config.json").symlink_to(f"../../blobs/{BLOB}")
    with pytest.raises(CheckpointError, match="link out of"):
        safe_file(snapshot, "config.json")


def test_a_single_file_is_its_own_index(root: Path) -> None:
    write_weights(root / SINGLE_NAME, "b", "a")
    assert read_index(root) == {"a": SINGLE_NAME, "b": SINGLE_NAME}


def test_an_index_names_the_shards(root: Path) -> None:
    write_weights(root / "s1.safetensors", "a")
    write_weights(root / "s2.safetensors", "b", "c")
    weight_map = {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"}
    write_index(root, weight_map, metadata={"total_size": 24})
    assert read_index(root) == weight_map
    write_index(root, weight_map)
    assert read_index(root) == weight_map


@pytest.mark.parametrize(
    ("weight_map", "rule"),
    [
        ({}, "non-empty object"),
        ([], "non-empty object"),
        (None, "non-empty object"),
        ({"a": 1}, "not the name of a safetensors file"),
        ({"a": None}, "not the name of a safetensors file"),
        ({"a": ["s1.safetensors"]}, "not the name of a safetensors file"),
        ({"a": "config.json"}, "not the name of a safetensors file"),
        ({"a": "pytorch_model.bin"}, "not the name of a safetensors file"),
        ({"a": "s1.safetensors", "b": "../out.safetensors"}, "not a plain file name"),
        ({"a": "/out.safetensors"}, "not a plain file name"),
        ({"a": "s1.safetensors", "b": "missing.safetensors"}, "cannot be opened"),
        ({"a": "s1.safetensors", "b": "link.safetensors"}, "link out of"),
        ({"": "s1.safetensors"}, "tensor name"),
        ({"a\0": "s1.safetensors"}, "tensor name"),
    ],
)
def test_each_lie_of_an_index_is_refused(root: Path, weight_map: Any, rule: str) -> None:
    write_weights(root / "s1.safetensors", "a")
    write_weights(root.parent / "out.safetensors", "b")
    (root / "link.safetensors").symlink_to("../out.safetensors")
    (root / "config.json").write_text("{}")
    (root / "pytorch_model.bin").write_text("x")
    write_index(root, weight_map)
    with pytest.raises(CheckpointError, match=rule):
        read_index(root)


def test_the_schema_of_the_index_is_closed(root: Path) -> None:
    write_weights(root / "s1.safetensors", "a")
    write_index(root, {"a": "s1.safetensors"}, surprise=1)
    with pytest.raises(CheckpointError, match="weight_map and, at most, metadata"):
        read_index(root)
    for text in ("[]", "{}", '{"metadata": {}}'):
        (root / INDEX_NAME).write_text(text)
        with pytest.raises(CheckpointError, match="weight_map and, at most, metadata"):
            read_index(root)
    (root / INDEX_NAME).write_text('{"weight_map": {"a": "s1.safetensors", "a": "s1.safetensors"}}')
    with pytest.raises(CheckpointError, match="given twice"):
        read_index(root)


def test_an_index_beside_another_single_file_is_ambiguous(root: Path) -> None:
    write_weights(root / "s1.safetensors", "a")
    write_weights(root / SINGLE_NAME, "a")
    write_index(root, {"a": "s1.safetensors"})
    with pytest.raises(CheckpointError, match="remove the stale one"):
        read_index(root)
    write_index(root, {"a": SINGLE_NAME})
    assert read_index(root) == {"a": SINGLE_NAME}


def test_a_broken_index_is_not_taken_for_none(root: Path) -> None:
    write_weights(root / SINGLE_NAME, "a")
    (root / INDEX_NAME).symlink_to("missing.json")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_index(root)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_to_be_converted(root: Path, name: str) -> None:
    (root / "config.json").write_text("{}")
    (root / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="convert it to safetensors first"):
        read_index(root)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("config.json", "no weights"), ("x.gguf", "GGUF"), ("model-00001-of-00002.safetensors", "complete the download")],
)
def test_no_weights_are_an_error_that_says_what_is_there(root: Path, name: str, rule: str) -> None:
    (root / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rule):
        read_index(root)
