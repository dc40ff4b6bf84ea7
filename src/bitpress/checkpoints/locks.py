"""Locks on open files, which end with the process: of the process that works in a directory, and of those that read a model of the cache.

A job's lock file holds the number of its process. Locks are those of flock: shared ones for readers, an exclusive one for a writer.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["JOB_LOCK", "describe_job", "hold", "is_same", "lock_alone", "lock_shared", "working_process"]

JOB_LOCK = "lock"
_held: dict[Path, int] = {}
_PROBE_SECONDS = 0.2  # a reader that looks for a lock holds it itself for a moment


def lock_alone(descriptor: int, seconds: float = _PROBE_SECONDS) -> bool:
    """Take an exclusive lock; return False while others hold one."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        else:
            return True


def lock_shared(descriptor: int) -> bool:
    """Take a shared lock; return False while somebody holds an exclusive one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_same(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def hold(directory: Path) -> bool:
    """Keep a directory of the cache from being cleared until this process ends; return False if it has gone meanwhile."""
    if directory in _held and is_same(_held[directory], directory):
        return True
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not is_same(descriptor, directory):
        os.close(descriptor)
        return False
    with contextlib.suppress(OSError):  # when it was used last; a cache may be read-only
        os.utime(directory)
    _held[directory] = descriptor
    return True


def working_process(job: Path) -> str | None:
    """Name the process that works on the job in a folder: `process 4711` or `this process`; None if nobody does."""
    with _opened(job / JOB_LOCK) as descriptor:
        if descriptor is None or lock_shared(descriptor):
            return None
        written = os.pread(descriptor, 20, 0).strip()
        if not written.isdigit():
            return "another process"
        return "this process" if int(written) == os.getpid() else f"process {written.decode()}"


def describe_job(job: Path) -> str:
    """Say why a directory with or without a job's folder is no model yet."""
    if (worker := working_process(job)) is not None:
        return f"{worker} is making a model here: wait until it is done"
    return "a job here is unfinished: run the same quantize command again" if job.exists() else "bitpress did not publish it"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
