"""Exports that lie in a model's own directory: what bitpress wrote there, of which model, and what it told of each."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.jsonfile import read_json, write_json_bytes
from bitpress.checkpoints.manifest import MANIFEST_NAME
from bitpress.errors import CheckpointError, DiskError

__all__ = ["EXPORTS", "note_export", "noted_export", "remove_exports"]

# The file in a model's directory that lists them.
EXPORTS = "exports.json"


def note_export(directory: Path, name: str, told: Mapping[str, object] | None = None) -> None:
    """Note that bitpress writes an export of this name for the model of a directory, and with `told` that it is whole. Raises DiskError."""
    note = {"manifest": _manifest(directory), "files": _sizes(directory / name), "told": told and dict(told)}
    write_durably(directory / EXPORTS, [write_json_bytes(_noted(directory) | {name: note})])


def noted_export(directory: Path, name: str) -> dict[str, object] | None:
    """Return the report of an export of the model in a directory; None without one, and where its files have changed since."""
    note = _noted(directory).get(name)
    if (
        note is None
        or note["told"] is None
        or note["manifest"] != _manifest(directory)
        or note["files"] != _sizes(directory / name)
    ):
        return None
    told: dict[str, object] = note["told"]
    return told


def remove_exports(directory: Path, names: Collection[str]) -> None:
    """Remove those exports of these names that bitpress wrote into a model's directory; what others put there stays. Raises DiskError."""
    for name in _noted(directory).keys() & set(names):
        path = directory / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{path}: cannot be removed: {error.strerror}.") from error


def _noted(directory: Path) -> dict[str, Any]:
    """Return the list of exports. Raises CheckpointError for one that bitpress did not write."""
    path = directory / EXPORTS
    if not path.exists():
        return {}
    found = read_json(path)
    keys = {"manifest", "files", "told"}
    if not isinstance(found, dict) or any(not isinstance(note, dict) or note.keys() != keys for note in found.values()):
        raise CheckpointError(f"{path}: is no list of exports that bitpress wrote; remove it, and what was exported beside it.")
    return found


def _manifest(directory: Path) -> str:
    return hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()


def _sizes(export: Path) -> dict[str, int]:
    """Return the size of every file of an export by its name there."""
    files = [export] if export.is_file() else [path for path in export.rglob("*") if path.is_file()]
    return {path.relative_to(export.parent).as_posix(): path.stat().st_size for path in files}
