"""One start reads a directory once: its manifest, its configuration, the hash of every file."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bitpress
from bitpress import native
from bitpress.checkpoints import compressed
from bitpress.cli.chat import answer_once
from bitpress.cli.request import Request
from bitpress.errors import CheckpointError
from bitpress.models.skeleton import build_config
from bitpress.runtime.native import layout_cache
from bitpress.runtime.opening import OpenedModel

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


@pytest.fixture
def count(pressed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count manifests opened, checkpoints opened, configurations built, files hashed, and looks at whether the files are complete."""
    monkeypatch.setenv("BITPRESS_LAYOUTS", str(tmp_path / "layouts"))
    seen: Counter[str] = Counter()

    def counted(what: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[what] += 1
            return real(*args, **options)

        return call

    def open_file(path: Any, *args: Any, **options: Any) -> int:
        seen["manifest"] += str(path).endswith("bitpress.json")
        return os_open(path, *args, **options)

    os_open = os.open
    monkeypatch.setattr(os, "open", open_file)
    for module in [m for name, m in sys.modules.items() if name.startswith("bitpress.") and hasattr(m, "build_config")]:
        monkeypatch.setattr(module, "build_config", counted("configuration", build_config))
    monkeypatch.setattr(compressed.CompressedCheckpoint, "open", counted("checkpoint", compressed.CompressedCheckpoint.open))
    monkeypatch.setattr(compressed, "hash_file", counted("hash", compressed.hash_file))
    opening = sys.modules["bitpress.runtime.opening"]
    monkeypatch.setattr(opening, "is_complete", counted("complete", layout_cache.is_complete))
    return seen


@pytest.fixture
def once(pressed_dir: Path) -> dict[str, int]:
    files = len(compressed.CompressedCheckpoint.open(pressed_dir).manifest.files)
    return {"manifest": 1, "checkpoint": 1, "configuration": 1, "hash": files}


@needs_native
@pytest.mark.parametrize("start", ["load", "run"])
def test_a_native_start_reads_everything_once(
    start: str, pressed_dir: Path, once: dict[str, int], count: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ({**once, "complete": start == "run"}, {"manifest": 1, "complete": 1}):
        count.clear()
        if start == "run":
            _, facts = answer_once(pressed_dir, "The sky", Request(max_tokens=2))
            assert facts["runtime"] == "native"
        else:
            bitpress.load(pressed_dir, runtime="native")
        assert +count == +Counter(expected)


@pytest.mark.parametrize("start", ["load", "run"])
def test_a_start_of_transformers_reads_everything_once(
    start: str, pressed_dir: Path, once: dict[str, int], count: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if start == "run":
        _, facts = answer_once(pressed_dir, "The sky", Request(max_tokens=2, runtime="transformers"))
        assert facts["runtime"] == "transformers"
    else:
        bitpress.load(pressed_dir)
    assert +count == +Counter(once)


def test_files_are_hashed_though_the_checkpoint_was_opened_before(pressed_dir: Path) -> None:
    shard = next(pressed_dir.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    model = OpenedModel(pressed_dir)
    assert model.checkpoint.manifest.files
    with pytest.raises(CheckpointError, match="SHA-256"):
        model.verified()
    with pytest.raises(CheckpointError, match="SHA-256"):
        model.verified()
    assert OpenedModel(pressed_dir, verify=False).verified() is not None
