"""The cache is listed and cleared, and nothing else is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitpress.checkpoints.cache import clear_cache, list_cache
from bitpress.checkpoints.locks import hold
from bitpress.cli.app import app
from bitpress.errors import UsageError

HASH = "ab" * 32
OTHERS = ("mine.txt", "models/not-made-here/weights", "gguf/notes/x", "files/readme", "layouts/other.txt", "benchmarks/run/x")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one entry of every kind, and files of other people between them."""
    root = tmp_path / "cache"
    monkeypatch.setenv("BITPRESS_CACHE", str(root))
    monkeypatch.setenv("BITPRESS_LAYOUTS", "")
    given = {"format": "GGUF", "file_type": "Q4_K_M", "nbytes": 7_000_000, "parts": 1, "types": {"Q4_K": 7}}
    for name, content in {
        "models/smollm2-135m/origin.json": "{}",
        "models/smollm2-135m/model.safetensors": "x" * 1000,
        f"gguf/{HASH}/origin.json": json.dumps({"given": given, "file": "mine.Q4_K_M.gguf"}),
        f"gguf/known/{HASH}": HASH,
        f"files/{HASH}.gguf": "x" * 10,
        f"layouts/{HASH[:32]}.layout": "x" * 20,
        **dict.fromkeys(OTHERS, "mine"),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def kinds() -> list[str]:
    return [entry.kind for entry in list_cache()]


def test_everything_is_listed_with_its_bytes(cache: Path) -> None:
    entries = {entry.kind: entry for entry in list_cache()}
    assert list(entries) == ["model", "gguf", "file", "layout"]
    assert (entries["model"].name, entries["model"].nbytes) == ("smollm2-135m", 1002)
    assert (entries["gguf"].name, entries["gguf"].key) == ("mine.Q4_K_M.gguf", HASH[:12])
    assert entries["gguf"].what == "converted from GGUF Q4_K_M, 7.0 MB"
    assert (entries["file"].name, entries["layout"].name) == (HASH[:12], HASH[:12]), "nobody knows what these are of"
    assert entries["file"].nbytes == 10


def test_only_what_is_named_goes(cache: Path) -> None:
    assert [entry.kind for entry in clear_cache(["file"]).removed] == ["file"]
    assert kinds() == ["model", "gguf", "layout"]
    clear_cache(["smollm2-135m"])
    assert kinds() == ["gguf", "layout"]
    with pytest.raises(UsageError, match="Did you mean 'layout'"):
        clear_cache(["layouts"])
    assert kinds() == ["gguf", "layout"]


def test_clearing_all_leaves_what_is_not_ours(cache: Path) -> None:
    assert len(clear_cache().removed) == 4
    assert kinds() == []
    left = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert left == set(OTHERS)


def test_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "origin.json").write_text("{}")
    (cache / "models" / "linked").symlink_to(tmp_path / "away")
    os.rename(cache / "files", tmp_path / "files")
    (cache / "files").symlink_to(tmp_path / "files")
    clear_cache()
    assert (tmp_path / "away" / "origin.json").exists()
    assert (tmp_path / "files" / f"{HASH}.gguf").exists()
    assert not (cache / "models" / "linked").exists()


def test_nothing_goes_while_a_process_works_there(cache: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        workshop = cache / "gguf" / f".{other.pid}-abc"
        workshop.mkdir()
        with pytest.raises(UsageError, match=f"process {other.pid} is writing to the cache"):
            clear_cache()
        assert len(kinds()) == 4
    finally:
        other.communicate(b"\n")
    assert len(clear_cache().removed) == 4


def test_the_command(cache: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["cache", *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    listed = json.loads(run("--json"))
    assert (listed["bytes"], len(listed["entries"]), listed["cleared"]) == (
        sum(e["bytes"] for e in listed["entries"]),
        4,
        False,
    )
    assert "smollm2-135m" in run()
    assert len(kinds()) == 4
    assert json.loads(run("--clear", "model", "--json"))["cleared"] is True
    assert kinds() == ["gguf", "file", "layout"]
    with pytest.raises(UsageError, match="needs --clear"):
        run("gguf")
    run("--clear")
    assert kinds() == []


def test_what_a_running_command_reads_stays(cache: Path) -> None:
    code = "import sys; from bitpress.checkpoints.named import resolve_model; print(resolve_model(sys.argv[1]), flush=True); input()"
    model = cache / "models" / "smollm2-135m"
    os.utime(model, (0, 0))
    command = [sys.executable, "-c", code, str(model)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == str(model)
        done = CliRunner().invoke(app, ["cache", "--clear"], catch_exceptions=False)
        assert "smollm2-135m stays: a running command reads it." in done.output
        assert [(entry.kind, entry.used > 0) for entry in list_cache()] == [("model", True)]
    finally:
        reader.communicate("\n")
    assert len(clear_cache().removed) == 1


def test_a_model_that_was_cleared_is_not_held(cache: Path) -> None:
    assert hold(cache / "models" / "smollm2-135m")
    assert [entry.name for entry in clear_cache(["model"]).in_use] == ["smollm2-135m"], "not by this process either"
    assert not hold(cache / "models" / "nothing")
