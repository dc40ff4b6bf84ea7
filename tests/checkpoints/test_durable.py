"""Durable writes: whole files or none, with faults at every system call."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitpress.checkpoints import durable
from bitpress.checkpoints.durable import append_durably, fsync_directory, hash_file, write_durably
from bitpress.errors import CheckpointError, DiskError


class Faults:
    """Replaces system calls in `durable`: records their order, and makes call number `at` of one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_name = ""
        self.fail_at = 0
        self.error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name in ("write", "fsync", "rename", "open", "close"):
            monkeypatch.setattr(durable.os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if name == self.fail_name and self.calls.count(name) == self.fail_at:
                if name == "write":  # a disk that fills up takes a part first
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if name == "close":
                    real(*arguments)
                raise self.error
            return real(*arguments, **options)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with monkeypatch.context() as patch:
        yield Faults(patch)


def test_bytes_and_hash_are_of_what_is_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    block = os.urandom(3 * 2**20)
    chunks = [b"", block, memoryview(block)[5:9], b"end", bytes(2**23)]
    content = b"".join(chunks)
    assert write_durably(path, chunks) == (len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    assert hash_file(path) == hashlib.sha256(content).hexdigest()
    assert os.listdir(tmp_path) == ["shard"]


def test_chunks_of_other_item_sizes_count_in_bytes(tmp_path: Path) -> None:
    words = memoryview(bytearray(range(16))).cast("I")
    assert write_durably(tmp_path / "a", [words])[0] == 16
    assert (tmp_path / "a").read_bytes() == bytes(range(16))


def test_no_chunks_make_an_empty_file(tmp_path: Path) -> None:
    assert write_durably(tmp_path / "a", []) == (0, hashlib.sha256(b"").hexdigest())
    assert (tmp_path / "a").read_bytes() == b""


def test_the_calls_come_in_the_order_of_the_protocol(tmp_path: Path, faults: Faults) -> None:
    write_durably(tmp_path / "a", [b"one", b"two"])
    assert faults.calls == ["open", "write", "write", "fsync", "close", "rename", "open", "fsync", "close"]
    faults.calls.clear()
    append_durably(tmp_path / "journal", b"line\n")
    assert faults.calls == ["open", "open", "write", "fsync", "close", "open", "fsync", "close"]
    faults.calls.clear()
    append_durably(tmp_path / "journal", b"line\n")
    assert faults.calls == ["open", "write", "fsync", "close"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize(
    ("name", "at", "written"),
    [("open", 1, 0), ("write", 1, 0), ("write", 2, 4), ("fsync", 1, 8), ("close", 1, 8), ("rename", 1, 8)],
)
def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, faults: Faults, name: str, at: int, written: int, number: int
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    faults.fail_name, faults.fail_at, faults.error = name, at, OSError(number, os.strerror(number))
    with pytest.raises(DiskError) as caught:
        write_durably(path, [b"1234", b"5678"])
    for part in (str(path), f"after {written} bytes", os.strerror(number), "same command"):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"
    num_opened = faults.calls.count("open") - (name == "open")
    assert faults.calls.count("close") == num_opened


def test_a_failed_sync_of_the_directory_is_no_success(tmp_path: Path, faults: Faults) -> None:
    faults.fail_name, faults.fail_at = "fsync", 2
    with pytest.raises(DiskError, match="directory not synced"):
        write_durably(tmp_path / "a", [b"1234"])
    assert os.listdir(tmp_path) == ["a"]  # whole, under its own name: the next run writes it again
    assert (tmp_path / "a").read_bytes() == b"1234"


def test_a_file_system_that_cannot_sync_directories_is_usable(tmp_path: Path, faults: Faults) -> None:
    faults.fail_name, faults.fail_at, faults.error = "fsync", 1, OSError(errno.EINVAL, "no")
    fsync_directory(tmp_path)
    assert faults.calls == ["open", "fsync", "close"]


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_an_interrupt_removes_the_partial_file(tmp_path: Path, faults: Faults, name: str) -> None:
    faults.fail_name, faults.fail_at, faults.error = name, 1, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "a", [b"1234"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), OSError(errno.EIO, "the source's"), SystemExit(75)])
def test_an_error_of_the_chunks_passes_unchanged(tmp_path: Path, error: BaseException) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1234"
        assert os.listdir(tmp_path) == ["a.tmp"]
        raise error

    with pytest.raises(type(error)) as caught:
        write_durably(tmp_path / "a", chunks())
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a.tmp").write_bytes(b"torn and much longer than the new content")
    write_durably(tmp_path / "a", [b"new"])
    (tmp_path / "b.tmp").symlink_to(victim)
    write_durably(tmp_path / "b", [b"new"])
    os.link(victim, tmp_path / "c.tmp")
    write_durably(tmp_path / "c", [b"new"])
    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"new"] * 3
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "victim"]


def test_a_directory_that_is_not_there_is_a_disk_error(tmp_path: Path) -> None:
    for action in (
        lambda: write_durably(tmp_path / "no" / "a", [b"x"]),
        lambda: append_durably(tmp_path / "no" / "a", b"x"),
        lambda: fsync_directory(tmp_path / "no"),
    ):
        with pytest.raises(DiskError, match="No such file"):
            action()


@pytest.mark.parametrize("limit", [0, 1, 5000, 100_000])
def test_a_real_limit_of_the_system(tmp_path: Path, limit: int) -> None:
    script = """
import resource, sys
from pathlib import Path
from bitpress.checkpoints.durable import append_durably, write_durably
from bitpress.errors import DiskError
path, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for action in (lambda: write_durably(path, [bytes(3000)] * 50), lambda: append_durably(path, bytes(limit + 1))):
    try:
        action()
    except DiskError as error:
        print(error)
"""
    source = str(Path(durable.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a"), str(limit)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert f"after {limit} bytes: {os.strerror(errno.EFBIG)}" in lines[0]
    assert f"after {limit} bytes: {os.strerror(errno.EFBIG)}" in lines[1]
    assert os.listdir(tmp_path) == []


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from bitpress.checkpoints.durable import write_durably
def chunks():
    yield bytes(1000)
    os.kill(os.getpid(), signal.SIGKILL)
    yield bytes(1000)
write_durably(Path(sys.argv[1]), chunks())
"""
    source = str(Path(durable.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": source},
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["a.tmp"]
    assert write_durably(tmp_path / "a", [b"whole"])[0] == 5
    assert os.listdir(tmp_path) == ["a"]


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for line in (b"one\n", b"two\n", b"three\n"):
        append_durably(path, line)
    assert path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("before", [None, b"one\n"])
def test_a_failed_append_is_taken_back(
    tmp_path: Path, faults: Faults, name: str, before: bytes | None, error: BaseException
) -> None:
    path = tmp_path / "journal"
    if before is not None:
        path.write_bytes(before)
    faults.fail_name, faults.fail_at, faults.error = name, 1, error
    with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
        append_durably(path, b"two\n")
    assert (path.read_bytes() if path.exists() else None) == before
    append_durably(path, b"three\n")
    assert path.read_bytes() == (before or b"") + b"three\n"


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "journal").symlink_to(tmp_path / "victim")
    with pytest.raises(DiskError):
        append_durably(tmp_path / "journal", b"line\n")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_only_regular_files_are_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(CheckpointError, match=r"regular file|cannot be opened"):
            hash_file(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    real = os.preadv

    def shrinking(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 60)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(durable.os, "preadv", shrinking)
    with pytest.raises(CheckpointError, match="ends at byte 60, but 100 bytes"):
        hash_file(path)
