"""The tokenizer of a model directory: files only, no code that a checkpoint carries, no network."""

import codecs
import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitpress.checkpoints.directory import open_directory, safe_file
from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.checkpoints.jsonfile import read_foreign_json
from bitpress.checkpoints.side_files import CHAT_TEMPLATES, check_listed_name, listed_file, read_side_file
from bitpress.errors import BitpressError, CheckpointError
from bitpress.exhaustion import is_out_of_memory

__all__ = ["check_tokenizer", "load_tokenizer", "reader_errors"]

_FAST = "tokenizer.json"
_VOCABULARIES = (
    _FAST,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
_OPENED = (".json", ".jinja", ".model", ".tiktoken", ".txt")
# The packages that transformers needs to read a vocabulary; a SentencePiece model is a protocol buffer whose first field is a piece.
_SENTENCEPIECE = (b"\n", ("sentencepiece", "google.protobuf"), "pip install sentencepiece protobuf")
_TIKTOKEN = (b"", ("tiktoken",), "pip install tiktoken")


def load_tokenizer(root: Path) -> Any:
    """Load transformers' tokenizer from a local directory. Raises CheckpointError."""
    root = open_directory(root)
    check_tokenizer(root)
    from transformers import AutoTokenizer

    with reader_errors(f"{root}: the tokenizer cannot be loaded"), _without_marks(root) as place:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)


def check_tokenizer(root: Path) -> None:
    """Raise CheckpointError for a directory without a tokenizer, or whose tokenizer needs code or a missing package."""
    root = open_directory(root)
    present = _openable(root)
    if not any(name in _VOCABULARIES or name.endswith(".tiktoken") for name in present):
        raise CheckpointError(f"{root}: holds no tokenizer; one of {', '.join(_VOCABULARIES)} is needed.")
    for name in ("config.json", "tokenizer_config.json"):
        if name in present:
            _refuse_code(root, name)
    if _FAST not in present:
        for name in present:
            if name.endswith((".model", ".tiktoken")):
                _check_packages(root, name)


def _openable(root: Path) -> list[str]:
    """Return the files that transformers may open for a tokenizer. Raises CheckpointError for a link out of the directory."""
    try:
        names = sorted(os.listdir(root))
        templates = sorted(os.listdir(root / CHAT_TEMPLATES)) if (root / CHAT_TEMPLATES).is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: cannot be listed: {error.strerror}.") from error
    for leaf in templates:
        if leaf.endswith(".jinja"):
            listed_file(root, f"{CHAT_TEMPLATES}/{leaf}")
    present = [name for name in names if name.endswith(_OPENED) and not name.startswith(".") and not (root / name).is_dir()]
    for name in present:
        safe_file(root, name, check_listed_name)
    return present


def _check_packages(root: Path, name: str) -> None:
    path = root / name
    with open_regular(path) as (descriptor, num_bytes):
        start = bytearray(min(num_bytes, 1))
        read_into(path, descriptor, memoryview(start), 0)
    _, packages, command = _SENTENCEPIECE if bytes(start) == _SENTENCEPIECE[0] else _TIKTOKEN
    if not all(_is_here(package) for package in packages):
        raise CheckpointError(f"{root}: the tokenizer is {name} without a {_FAST}; to read it, run: {command}.")


def _is_here(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a package inside one that is not there
        return False


def _refuse_code(root: Path, name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_foreign_json(safe_file(root, name))
    if not isinstance(values, dict):
        raise CheckpointError(f"{root / name}: must be an object.")
    code = values.get("auto_map")
    if not code:
        return
    # A model that transformers knows may name code for others; a tokenizer that needs it cannot be had without.
    is_known = name == "tokenizer_config.json" or values.get("model_type") in CONFIG_MAPPING
    if not is_known or not isinstance(code, dict) or "AutoTokenizer" in code:
        raise CheckpointError(
            f"{root / name}: the tokenizer comes as code of the checkpoint (auto_map), which bitpress never runs."
        )


@contextlib.contextmanager
def _without_marks(root: Path) -> Iterator[Path]:
    """Yield a directory whose JSON has no byte order marks (transformers does not read them): `root` itself, or a copy."""
    names = [name for name in _openable(root) if name.endswith(".json")]
    if not any(_begins_with_mark(root / name) for name in names):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        place = Path(folder)
        for name in _openable(root):
            (place / name).write_bytes(read_side_file(root / name))
        if (root / CHAT_TEMPLATES).is_dir():
            (place / CHAT_TEMPLATES).mkdir()
            for path in (root / CHAT_TEMPLATES).glob("*.jinja"):
                (place / CHAT_TEMPLATES / path.name).write_bytes(read_side_file(path))
        yield place


def _begins_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


@contextlib.contextmanager
def reader_errors(what: str) -> Iterator[None]:
    """Turn the errors of transformers and tokenizers for an unreadable file into a CheckpointError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except BitpressError:
        raise
    except StrictDataclassError as error:
        raise CheckpointError(f"{what}: {str(error).strip().splitlines()[-1].strip()[:300]}") from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _broken(what, error) from error
    except Exception as error:
        if type(error) is not Exception:  # the one class that tokenizers raises
            raise
        raise _broken(what, error) from error


def _broken(what: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    return CheckpointError(f"{what}: {lines[0][:300] if lines else type(error).__name__}")
