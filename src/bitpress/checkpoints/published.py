"""Files and directories that appear whole or not at all: written under another name beside their place, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from bitpress.checkpoints.durable import fsync_directory, write_durably
from bitpress.errors import DiskError, UsageError

__all__ = ["EXPORTS", "check_absent", "note_export", "published", "remove_exports"]

# The file in a model's directory that names the exports which bitpress wrote beside it.
EXPORTS = "exports.txt"


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
    try:
        parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=parent))
    except OSError as error:
        raise DiskError(f"{parent}: cannot be written to: {error.strerror}.") from error
    made = workshop / out.name
    try:
        if not file:
            made.mkdir()
        yield made
        with _disk_errors(out):
            if os.path.lexists(out):  # made meanwhile; a rename would replace a file without a word
                raise UsageError(f"{out}: was made by another process meanwhile; nothing was written.")
            os.rename(made, out)
        fsync_directory(parent)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{out}: cannot be put into place: {error.strerror}.") from error


def note_export(directory: Path, name: str) -> None:
    """Note that bitpress wrote an export of this name into a model's directory. Raises DiskError."""
    names = sorted(_noted(directory) | {name})
    write_durably(directory / EXPORTS, ["".join(f"{name}\n" for name in names).encode()])


def remove_exports(directory: Path, names: Collection[str]) -> None:
    """Remove those exports of these names that bitpress wrote into a model's directory; what others put there stays. Raises DiskError."""
    for name in _noted(directory) & set(names):
        path = directory / name
        with _disk_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _noted(directory: Path) -> set[str]:
    path = directory / EXPORTS
    return set(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.is_file() else set()
