"""The cache: what is in it, and taking it out again.

    <cache>/models/<name>/           named models, converted
    <cache>/gguf/<sha256>/           .gguf files, converted;  gguf/known/: hashes of files that were seen, a few bytes each
    <cache>/files/<sha256><suffix>   what was fetched from the Python package index
    <cache>/layouts/*.layout         models as the native engine has laid them out (elsewhere with BITPRESS_LAYOUTS)

Only entries with such names are listed or removed; other files in the cache are left alone. A process that is writing an entry has a
folder `.<process>-...` beside it.
"""

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.checkpoints.given import ORIGIN, Given, read_given
from bitpress.errors import DiskError, UsageError, unknown_name
from bitpress.settings import cache_directory, layout_directory

__all__ = ["CacheEntry", "clear_cache", "list_cache"]

_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]+)*")
_LAYOUT = re.compile(r"[0-9a-f]{32}\.layout")
_WORKSHOP = re.compile(r"\.([0-9]+)-.+")
_SHOWN = 12  # digits of a hash that name an entry


@dataclass(frozen=True)
class CacheEntry:
    """One thing that can be removed by its `name`; `what` says what it is made from."""

    kind: str
    name: str
    what: str
    nbytes: int
    path: Path

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "what": self.what, "bytes": self.nbytes, "path": str(self.path)}


def list_cache() -> list[CacheEntry]:
    """List what the cache holds, by kind and name. Raises DiskError."""
    try:
        return [*_models(), *_converted(), *_files(), *_layouts()]
    except OSError as error:
        raise DiskError(f"{error.filename}: cannot be read: {error.strerror}.") from error


def clear_cache(names: Collection[str] = ()) -> list[CacheEntry]:
    """Remove the entries with these names or of these kinds, or all of them; return the removed entries.

    Raises UsageError for an unknown name or while another process writes to the cache, and DiskError.
    """
    entries = list_cache()
    known = {entry.name for entry in entries} | {entry.kind for entry in entries}
    for name in names:
        if name not in known:
            raise unknown_name("entry of the cache", name, known, listed="See bitpress cache.")
    _check_idle()
    chosen = [entry for entry in entries if not names or entry.name in names or entry.kind in names]
    for entry in chosen:
        _remove(entry.path)
    if any(entry.kind == "gguf" for entry in chosen):
        _remove_hashes()
    return chosen


def _models() -> Iterator[CacheEntry]:
    for path in _entries(cache_directory() / "models"):
        if (path / ORIGIN).is_file():
            given = read_given(path)
            yield CacheEntry("model", path.name, "re-gauged" if given is None else _told(given), _size(path), path)


def _converted() -> Iterator[CacheEntry]:
    for path in _entries(cache_directory() / "gguf"):
        if _HASH.fullmatch(path.name):
            given = read_given(path)
            yield CacheEntry("gguf", path.name[:_SHOWN], "GGUF" if given is None else _told(given), _size(path), path)


def _files() -> Iterator[CacheEntry]:
    for path in _entries(cache_directory() / "files"):
        if _FILE.fullmatch(path.name):
            yield CacheEntry("file", path.name[:_SHOWN], f"fetched, {path.suffix or 'no suffix'}", _size(path), path)


def _layouts() -> Iterator[CacheEntry]:
    folder = layout_directory()
    for path in _entries(folder) if folder is not None else ():
        if _LAYOUT.fullmatch(path.name):
            yield CacheEntry("layout", path.name[:_SHOWN], "laid out for the native engine", _size(path), path)


def _told(given: Given) -> str:
    return f"from {given.format} {given.file_type}, {given.nbytes:,} bytes"


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder of the cache; none if the folder is a link, since that leads elsewhere."""
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _size(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; links count as themselves."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size
    return sum(_size(item) for item in path.iterdir())


def _check_idle() -> None:
    for folder in ("models", "gguf", "files"):
        for path in _entries(cache_directory() / folder):
            found = _WORKSHOP.fullmatch(path.name)
            if found is not None and _is_running(int(found[1])):
                raise UsageError(f"{cache_directory()}: process {found[1]} is writing to the cache; wait for it or stop it.")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _remove_hashes() -> None:
    folder = cache_directory() / "gguf" / "known"
    for path in _entries(folder):
        if _HASH.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path}: cannot be removed: {error.strerror}.") from error
