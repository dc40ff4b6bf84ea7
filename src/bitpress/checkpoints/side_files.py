"""Side files: the files beside the weights that go with a model, such as tokenizers, processors, chat templates and licences.

Every regular file of the directory is carried over, and the templates in `additional_chat_templates/`. Files are left behind, with a
reason, if they may run as code, hold weights, have the name of a file that bitpress writes, or are too large. A side file that is
carried over is hashed; only its reader opens it.
"""

import codecs
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitpress.checkpoints.directory import (
    ALLOWED_NAMES,
    ALLOWED_SUFFIXES,
    check_file_name,
    is_plain_name,
    open_directory,
    safe_file,
)
from bitpress.checkpoints.durable import open_regular, read_into, read_regular
from bitpress.checkpoints.manifest import MANIFEST_NAME
from bitpress.errors import CheckpointError

__all__ = [
    "CHAT_TEMPLATES",
    "LeftBehind",
    "SideFiles",
    "check_listed_name",
    "find_side_files",
    "listed_file",
    "read_side_file",
]

CHAT_TEMPLATES = "additional_chat_templates"
MAX_SIDE_BYTES = 128 * 2**20  # of one file; the largest tokenizers have some 35 MB
MAX_ALL_SIDE_BYTES = 512 * 2**20
MAX_SIDE_FILES = 1000

_CODE = "it may run as code"
_PICKLED = "it may hold pickled objects, which run as code"
_WEIGHTS = "it holds weights"
_ARCHIVE = "it is an archive"
_REFUSED_SUFFIXES = {
    **dict.fromkeys((".py", ".pyc", ".pyi", ".pyx", ".pyd", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".com"), _CODE),
    **dict.fromkeys((".sh", ".bash", ".zsh", ".bat", ".cmd", ".ps1", ".vbs", ".pl", ".rb", ".php", ".lua", ".r", ".cu"), _CODE),
    **dict.fromkeys(
        (".c", ".cc", ".cpp", ".h", ".js", ".mjs", ".ts", ".wasm", ".jar", ".class", ".html", ".htm", ".svg"), _CODE
    ),
    **dict.fromkeys((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".mar"), _PICKLED),
    **dict.fromkeys((".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx", ".onnx_data", ".ort"), _WEIGHTS),
    **dict.fromkeys((".tflite", ".mlmodel", ".pb", ".pdparams", ".pdmodel", ".ot", ".nemo", ".llamafile", ".engine"), _WEIGHTS),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl"), _ARCHIVE),
}
# The first bytes of files whose names do not say what they are.
_REFUSED_STARTS = (
    (re.compile(rb"\x7fELF|MZ|#!|\xca\xfe\xba\xbe|[\xfe\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]"), _CODE),
    (re.compile(rb"\x80[\x02-\x09]"), _PICKLED),
    (re.compile(rb"GGUF|ggml|\x89HDF"), _WEIGHTS),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!"), _ARCHIVE),
)
_OWN = "a published directory has its own file of this name"
_REPLACED = frozenset({"config.json", "model.safetensors.index.json"})
_RESERVED = {
    **dict.fromkeys((MANIFEST_NAME, "report.json", "report.html", "readme.md"), _OWN),
    "adapter_config.json": "transformers would look for the adapter that it describes",
    **dict.fromkeys(("quantize_config.json", "quantization_config.json", "hf_quant_config.json"), "it describes other weights"),
}


@dataclass(frozen=True)
class LeftBehind:
    """A file or folder of a source that is not carried over, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class SideFiles:
    """The side files of a source: carried ones by their name in the published directory, and those left behind."""

    carried: Mapping[str, Path]
    left: tuple[LeftBehind, ...]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.carried.values())


def find_side_files(root: Path, own: Collection[str], needed: Collection[str]) -> SideFiles:
    """Sort the files of a model directory, except its configuration and its `own` files, such as the weights.

    Raises CheckpointError if a `needed` file cannot be carried over (a link out of the directory, a pipe). Any other file is left behind.
    """
    root = open_directory(root)
    carried: dict[str, Path] = {}
    left: list[LeftBehind] = []
    total = 0
    for name in _list(root):
        if name in _REPLACED or name in own:
            continue
        if (why := _refusal(root, name, total, len(carried))) is None:
            carried[name] = root / name
            total += carried[name].stat().st_size
        elif name in needed:
            safe_file(root, name)  # which says what is wrong with it
            raise CheckpointError(f"{root / name}: cannot be carried over: {why}.")
        else:
            left.append(LeftBehind(name.encode("utf-8", "backslashreplace").decode(), why))  # a report is UTF-8
    return SideFiles(carried, tuple(left))


def check_listed_name(where: str, name: str) -> None:
    """Raise CheckpointError for a name that no manifest may list: not plain (chat templates excepted), or of a kind that is left behind."""
    folder, slash, leaf = name.partition("/")
    if slash and folder == CHAT_TEMPLATES and leaf.endswith(".jinja") and is_plain_name(leaf):
        return
    if (
        not is_plain_name(name)
        or name.endswith(ALLOWED_SUFFIXES)
        or name in ALLOWED_NAMES
        or _refusal_of_name(name) is not None
    ):
        check_file_name(where, name)


def listed_file(root: Path, name: str) -> Path:
    """Return the path of a file that a manifest lists. Raises CheckpointError unless it is a regular file of `root` with an allowed name."""
    root = open_directory(root)
    check_listed_name(str(root), name)
    if "/" in name:
        _check_folder(root / CHAT_TEMPLATES)
    return safe_file(root, name, check_listed_name)


def read_side_file(path: Path) -> bytes:
    """Read a side file as it is published: unchanged, without a byte order mark before JSON, which no reader of models accepts."""
    data = read_regular(path)
    return data.removeprefix(codecs.BOM_UTF8) if path.suffix == ".json" else data


def _list(root: Path) -> Iterator[str]:
    """Names of everything in the directory, in order; for the folder of chat templates, what it holds."""
    try:
        for name in sorted(os.listdir(root)):
            if name == CHAT_TEMPLATES and stat.S_ISDIR(os.lstat(root / name).st_mode):
                yield from (f"{name}/{leaf}" for leaf in sorted(os.listdir(root / name)))
            else:
                yield name
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: cannot be listed: {error.strerror}.") from error


def _refusal(root: Path, name: str, total: int, count: int) -> str | None:
    """Return the reason why a file is left behind, or None if it is carried over."""
    if (root / name).is_dir():
        return "it is a folder"
    if (why := _refusal_of_name(name)) is not None:
        return why
    try:
        path = listed_file(root, name)
        with open_regular(path) as (descriptor, num_bytes):
            start = bytearray(min(num_bytes, 8))
            read_into(path, descriptor, memoryview(start), 0)
    except CheckpointError as error:
        return str(error).removeprefix(f"{root / name}: ").removesuffix(".")
    if num_bytes > MAX_SIDE_BYTES:
        return f"it has {num_bytes} bytes; at most {MAX_SIDE_BYTES} are carried over"
    if total + num_bytes > MAX_ALL_SIDE_BYTES or count >= MAX_SIDE_FILES:
        return f"at most {MAX_SIDE_FILES} files of {MAX_ALL_SIDE_BYTES} bytes together are carried over"
    return next((why for pattern, why in _REFUSED_STARTS if pattern.match(start)), None)


def _refusal_of_name(name: str) -> str | None:
    leaf = name.rpartition("/")[2]
    if not is_plain_name(leaf):
        return "its name begins with a dot" if leaf.startswith(".") else "its name is not plain"
    if name != leaf and not leaf.endswith(".jinja"):
        return "it is not a chat template"
    if name.casefold() in _RESERVED:
        return _RESERVED[name.casefold()]
    if name.casefold() in _REPLACED:
        return _OWN
    if name.casefold().endswith(".index.json"):
        return "it is the index of weights in another format"
    return _REFUSED_SUFFIXES.get(Path(leaf).suffix.casefold())


def _check_folder(folder: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be opened: {error.strerror}.") from error
    if not is_folder:
        raise CheckpointError(f"{folder}: is not a folder.")
