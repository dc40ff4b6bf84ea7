"""The cache: what is in it, and taking it out again.

    <cache>/models/<name>/           named models, converted
    <cache>/gguf/<sha256>/           .gguf files, converted;  gguf/known/: hashes of files that were seen, a few bytes each
    <cache>/imported/<sha256>/       models that other tools quantized, in our own format with their codes
    <cache>/files/<sha256><suffix>   what was fetched from the Python package index
    <cache>/layouts/*.layout         models as the native engine has laid them out (elsewhere with BITPRESS_LAYOUTS)

Only entries with such names are listed or removed; other files in the cache are left alone. A process that is writing an entry has a
folder `.<process>-...` beside it.
"""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.checkpoints.given import ORIGIN, Given, read_file_name, read_given
from bitpress.checkpoints.locks import lock_alone
from bitpress.checkpoints.named import NAMED_MODELS
from bitpress.errors import CheckpointError, DiskError, UsageError, unknown_name
from bitpress.settings import cache_directory, layout_directory

__all__ = ["CacheEntry", "Cleared", "clear_cache", "list_cache"]

_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]+)*")
_LAYOUT = re.compile(r"[0-9a-f]{32}\.layout")
_WORKSHOP = re.compile(r"\.([0-9]+)-.+")
_SHOWN = 12  # digits of a hash that name an entry


@dataclass(frozen=True)
class CacheEntry:
    """One thing that can be removed by its `name` or `key`.

    name    of the model or the file; where that is not known, the key
    key     the name of its path, a hash in short
    what    what it is, and what it is made from
    used    when it was made or used last, in seconds since 1970
    """

    kind: str
    name: str
    key: str
    what: str
    nbytes: int
    used: float
    path: Path

    @property
    def last_use(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.used))

    def as_dict(self) -> dict[str, Any]:
        shown = {"kind": self.kind, "name": self.name, "key": self.key, "what": self.what, "bytes": self.nbytes}
        return {**shown, "last_use": self.last_use, "path": str(self.path)}


@dataclass(frozen=True)
class Cleared:
    """The entries that are gone, and those that a running command reads, which stay."""

    removed: tuple[CacheEntry, ...]
    in_use: tuple[CacheEntry, ...]


def list_cache() -> list[CacheEntry]:
    """List what the cache holds, by kind and name. Raises DiskError."""
    try:
        return [*_models(), *_converted(), *_files(), *_layouts()]
    except OSError as error:
        raise DiskError(f"{error.filename}: cannot be read: {error.strerror}.") from error


def clear_cache(names: Collection[str] = ()) -> Cleared:
    """Remove the entries with these names or of these kinds, or all of them, but for those that a running command reads.

    Raises UsageError for an unknown name or while another process writes to the cache, and DiskError.
    """
    entries = list_cache()
    known = {word for entry in entries for word in (entry.name, entry.key, entry.kind)}
    for name in names:
        if name not in known:
            raise unknown_name("entry of the cache", name, known, listed="See bitpress cache.")
    _check_idle()
    chosen = [entry for entry in entries if not names or not {entry.name, entry.key, entry.kind}.isdisjoint(names)]
    removed = tuple(entry for entry in chosen if _remove_unused(entry.path))
    if any(entry.kind == "gguf" for entry in removed):
        _remove_hashes()
    return Cleared(removed, tuple(entry for entry in chosen if entry not in removed))


def _entry(kind: str, path: Path, name: str | None, what: str) -> CacheEntry:
    key = path.name[:_SHOWN] if kind != "model" else path.name
    return CacheEntry(kind, name or key, key, what, _size(path), path.lstat().st_mtime, path)


def _models() -> Iterator[CacheEntry]:
    for path in _entries(cache_directory() / "models"):
        if (path / ORIGIN).is_file():
            given = read_given(path)
            made = "weights that lie on no grid" if given is None else _told(given)
            yield _entry("model", path, None, f"named model, {made}")


def _converted() -> Iterator[CacheEntry]:
    for path in _entries(cache_directory() / "gguf"):
        if _HASH.fullmatch(path.name):
            given = read_given(path)
            yield _entry("gguf", path, read_file_name(path), "converted" if given is None else _told(given))
    for path in _entries(cache_directory() / "imported"):
        if _HASH.fullmatch(path.name):
            yield _entry("imported", path, read_file_name(path), "quantized by another tool, its codes in our own format")


def _files() -> Iterator[CacheEntry]:
    fetched = {model.sha256: model for model in NAMED_MODELS.values()}
    for path in _entries(cache_directory() / "files"):
        if _FILE.fullmatch(path.name):
            model = fetched.get(path.name[:64])
            if model is None:  # the questions of `eval --tasks`, whose table this floor does not know
                yield _entry("file", path, None, "fetched for tasks of eval")
            else:
                yield _entry("file", path, Path(model.member).name, f"fetched, of {model.requirement}")


def _layouts() -> Iterator[CacheEntry]:
    folder = layout_directory()
    for path in _entries(folder) if folder is not None else ():
        if _LAYOUT.fullmatch(path.name):
            yield _entry("layout", path, _model_of(path), "a compressed model, laid out for the native engine")


def _model_of(layout: Path) -> str | None:
    """Return the name of the directory that was laid out; older layouts do not say."""
    from bitpress.checkpoints.mapped_tree import read_prepared  # imports numpy

    with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
        name = read_prepared(layout, verify=False)["model"]
        return name if isinstance(name, str) else None
    return None


def _told(given: Given) -> str:
    return f"converted from GGUF {given.file_type}, {given.nbytes / 1e6:,.1f} MB"


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
    for folder in ("models", "gguf", "imported", "files"):
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


def _remove_unused(path: Path) -> bool:
    """Remove an entry; return False for one that a running command holds (`locks.hold`)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # a link, which nobody holds
        _remove(path)
        return True
    try:
        try:
            alone = lock_alone(descriptor, seconds=0)
        except OSError:  # a file system without locks
            alone = True
        if alone:
            _remove(path)
        return alone
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path}: cannot be removed: {error.strerror}.") from error
