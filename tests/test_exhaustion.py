"""When there is no more memory: one line and exit code 5, whatever the error is called and wherever it comes from."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints.tokenizer import reader_errors
from bitpress.cli import app
from bitpress.exhaustion import is_out_of_memory

PLENTY = 1 << 55


def from_torch() -> None:
    torch.empty(PLENTY)


def from_numpy() -> None:
    import numpy as np

    np.empty(PLENTY)


def from_python() -> None:
    bytearray(PLENTY)


def raises(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    def raise_it() -> None:
        raise error from cause

    return raise_it


SOURCES: dict[str, Callable[[], None]] = {
    "python": from_python,
    "numpy": from_numpy,
    "torch": from_torch,
    "native": raises(MemoryError("std::bad_alloc")),
    "fork": raises(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "thread": raises(RuntimeError("can't start new thread")),
    "mmap": raises(RuntimeError("unable to mmap 64 bytes from file <f>: Cannot allocate memory (12)")),
    "import": raises(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
    "lazy import": raises(RuntimeError("Failed to import a module"), MemoryError()),
}
OTHERS: dict[str, BaseException] = {
    "import": ImportError("No module named 'x'"),
    "threads' variables": ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    "value": ValueError("out of memory is not what happened"),
    "file": OSError(errno.ENOENT, "No such file"),
    "runtime": RuntimeError("shapes do not fit"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_of_it_is_one_line_and_exit_5(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "app", lambda **_: SOURCES[source]())
    monkeypatch.setattr(sys, "argv", ["bitpress", "formats"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    said = capsys.readouterr().err
    assert stop.value.code == 5
    assert said.startswith("error: out of memory: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors_are_not_taken_for_it(name: str) -> None:
    assert not is_out_of_memory(OTHERS[name])


def test_errors_in_a_circle_end() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_a_tokenizer_that_does_not_fit_is_no_bad_file() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"), reader_errors("tokenizer"):
        from_torch()


def limited(megabytes: int, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run the program under a limit of its address space."""
    command = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m bitpress {' '.join(map(str, words))}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("megabytes", [200, 800])
def test_a_limit_of_the_address_space_is_exit_5(megabytes: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Too little for torch, and for a job: the latter would be ended by a library that cannot say so."""
    words = ("--weights", "int4-row", "--quantizer", "rtn", "--proof-tokens", "0")
    done = limited(megabytes, "quantize", tiny_model("llama"), tmp_path / "out", *words)
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out of memory: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
