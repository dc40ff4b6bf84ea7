"""Files and directories that appear whole or not at all: written under another name beside their place, then renamed.

The other name is `.NAME.bitpress-xxxxxxxx`, a directory that its process holds locked; what a killed process left is removed by the next
one that writes the same name.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bitpress.checkpoints.durable import fsync_directory
from bitpress.checkpoints.locks import lock_alone
from bitpress.errors import DiskError, UsageError

__all__ = ["check_absent", "published"]


def check_absent(out: Path) -> None:
    """Raise UsageError if something has this name."""
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; choose another name, or remove it first.")


@contextlib.contextmanager
def published(out: Path, *, file: bool = False) -> Iterator[Path]:
    """Return a place to write a new directory, or with `file` a new file; it becomes `out` at the end, and nothing stays after an error.

    Raises UsageError if `out` exists, DiskError.
    """
    check_absent(out)
    parent = out.parent
    prefix = f".{out.name[:100]}.bitpress-"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left(parent, prefix)
        workshop = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(workshop, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError(f"{parent}: cannot be written to: {error.strerror}.") from error
    with contextlib.suppress(OSError):  # a file system without locks
        lock_alone(lock)
    made = workshop / out.name
    try:
        if not file:
            made.mkdir()
        try:
            yield made
        except DiskError as error:
            if str(workshop) not in str(error):
                raise
            raise DiskError(
                f"{out}: cannot be written: {_reason(error)}; nothing of it is left. Free space or choose another disk, then run the same "
                "command again."
            ) from error
        with _disk_errors(out):
            if os.path.lexists(out):  # made meanwhile; a rename would replace a file without a word
                raise UsageError(f"{out}: was made by another process meanwhile; nothing was written.")
            os.rename(made, out)
        fsync_directory(parent)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        os.close(lock)


def _reason(error: BaseException) -> str:
    """Return what the system said of a write that failed; some libraries do not pass it on."""
    cause = error.__cause__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else "the disk is full or failing"


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove directories of killed processes: those of this prefix that nobody holds locked."""
    for path in parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # not a directory, gone meanwhile, or of another user
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if lock_alone(lock, seconds=0):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{out}: cannot be put into place: {error.strerror}.") from error
