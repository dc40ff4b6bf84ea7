"""Model directories: which names may be opened, and which file holds which tensor.

A name that comes from a file (an index, a manifest) is never joined to a path before `safe_file` has seen it. Files
that can carry code (.py, .pkl, .bin, .pt, .pth) are on no list and are never opened.
"""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitpress.checkpoints.jsonfile import read_foreign_json, read_json
from bitpress.errors import CheckpointError

__all__ = [
    "ALLOWED_NAMES",
    "ALLOWED_SUFFIXES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "check_file_name",
    "is_plain_name",
    "open_directory",
    "read_index",
    "safe_file",
]

ALLOWED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")
ALLOWED_NAMES = ("README.md",)
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_CHARACTER = r"[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # no separator, control character or broken UTF-8
_PLAIN_NAME = re.compile(rf"(?!\.){_CHARACTER}{{1,255}}")
_BLOB_LINK = re.compile(r"((?:\.\./)+)blobs/([0-9a-f]{64}|[0-9a-f]{40})")


def open_directory(path: str | Path) -> Path:
    """Return the real path of an existing directory."""
    try:
        root = Path(os.path.realpath(path, strict=True))
        is_directory = stat.S_ISDIR(os.stat(root).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(
            f"{path}: cannot be opened. MODEL is a directory that holds config.json and {SINGLE_NAME} (or shards and "
            f"{INDEX_NAME}), such as a download of a model from a hub, or one that bitpress wrote."
        ) from error
    if not is_directory:
        raise CheckpointError(f"{path}: is not a directory. MODEL is the directory that holds config.json, or a .gguf file.")
    return root


def is_plain_name(name: Any) -> bool:
    """Claim that a name has no separator, no dot first and no control character."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def check_file_name(where: str, name: Any) -> None:
    """Raise CheckpointError for a name that is not plain (separator, leading dot, control characters) or not on the allow-list."""
    if not is_plain_name(name):
        raise CheckpointError(f"{where}: {str(name)[:80]!r} is not a plain file name.")
    if name not in ALLOWED_NAMES and not name.endswith(ALLOWED_SUFFIXES):
        allowed = ", ".join((*ALLOWED_SUFFIXES, *ALLOWED_NAMES))
        raise CheckpointError(f"{where}: {name[:80]!r} is not a kind of file that is opened; allowed: {allowed}.")


def safe_file(root: Path, name: str, check_name: Callable[[str, Any], None] = check_file_name) -> Path:
    """Return `root / name` if the name is plain and allowed and leads to a regular file that belongs to `root`."""
    root = open_directory(root)
    check_name(str(root), name)
    path = root / name
    try:
        mode = os.lstat(path).st_mode
        real = Path(os.path.realpath(path, strict=True)) if stat.S_ISLNK(mode) else path
        is_regular = stat.S_ISREG(os.stat(real).st_mode)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from error
    if not is_regular:
        raise CheckpointError(f"{path}: is not a regular file.")
    if stat.S_ISLNK(mode) and not _is_hub_blob(root, path, real):
        if not real.is_relative_to(root):
            raise CheckpointError(f"{path}: is a link out of {root}; copy the file into the directory.")
        check_name(str(path), real.name)  # a link does not make a forbidden file an allowed one
    return path


def read_index(root: Path, *, foreign: bool = False) -> dict[str, str]:
    """Return tensor name -> file name, from the index of the shards or from the header of the single file.

    `foreign` says that another tool wrote the index, which may then be larger and hold more than bitpress writes into one.
    """
    root = open_directory(root)
    has_index, has_single = os.path.lexists(root / INDEX_NAME), os.path.lexists(root / SINGLE_NAME)
    if has_index:
        weight_map = _read_weight_map(root, foreign)
        if has_single and SINGLE_NAME not in weight_map.values():
            raise CheckpointError(
                f"{root}: holds {SINGLE_NAME} and an index of other files, which readers resolve differently; "
                "remove the stale one."
            )
        return weight_map
    if has_single:
        from bitpress.checkpoints.safetensors_file import read_header  # imports torch, which opening a file does without

        entries, _ = read_header(safe_file(root, SINGLE_NAME))
        return dict.fromkeys(entries, SINGLE_NAME)
    raise _no_weights(root)


def _read_weight_map(root: Path, foreign: bool) -> dict[str, str]:
    path = safe_file(root, INDEX_NAME)
    index = read_foreign_json(path) if foreign else read_json(path)
    known = {"weight_map", "metadata"}
    if not isinstance(index, dict) or "weight_map" not in index or not (foreign or index.keys() <= known):
        raise CheckpointError(f"{path}: must be an object with weight_map and, at most, metadata.")
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be a non-empty object that maps tensor names to file names.")
    from bitpress.checkpoints.safetensors_file import check_tensor_name  # imports torch

    for tensor_name, name in weight_map.items():
        check_tensor_name(str(path), tensor_name)
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {tensor_name}: {str(name)[:80]!r} is not the name of a safetensors file.")
    for name in sorted(set(weight_map.values())):
        safe_file(root, name)
    return weight_map


def _is_hub_blob(root: Path, path: Path, real: Path) -> bool:
    """Claim that a link is one of the cache of the Hugging Face hub, the only kind that may leave the root.

    There `models--x--y/snapshots/<revision>/file` is a link to `../../blobs/<hash>`, shared by all revisions, with one more `../`
    for a file in a folder. Exactly that text is accepted, from exactly that place, and only when nothing on the way is another link.
    """
    link = _BLOB_LINK.fullmatch(os.readlink(path))
    cache = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and cache.name.startswith("models--")
    up = "../" * (1 + len(path.relative_to(root).parts))
    return link is not None and link.group(1) == up and is_snapshot and real == cache / "blobs" / link.group(2)


def _no_weights(root: Path) -> CheckpointError:
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        return CheckpointError(f"{root}: cannot be listed: {error.strerror}.")
    shards = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(_PICKLED)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if shards:
        return CheckpointError(f"{root}: holds {shards[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}; complete the download.")
    if pickled:
        return CheckpointError(
            f"{root}: the only weights are pickled ({pickled[0]}), a format that can run code and is never opened; "
            "convert it to safetensors first."
        )
    if gguf:
        return CheckpointError(f"{root}: holds {gguf[0]} but no safetensors file; name the GGUF file itself, or convert it.")
    return CheckpointError(f"{root}: holds no weights; {SINGLE_NAME}, or shards with {INDEX_NAME}, are needed.")
