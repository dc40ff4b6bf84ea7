"""The tokenizer of a model directory: files only, no code that a checkpoint carries, no network."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitpress.checkpoints.directory import open_directory, safe_file
from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.source import SIDE_FILES
from bitpress.errors import BitpressError, CheckpointError

__all__ = ["load_tokenizer", "reader_errors"]

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(root: Path) -> Any:
    """Load transformers' tokenizer from a local directory. Raises CheckpointError."""
    root = open_directory(root)
    present = [name for name in SIDE_FILES if (root / name).exists() and safe_file(root, name)]
    if not any(name in present for name in _VOCABULARIES):
        raise CheckpointError(f"{root}: holds no tokenizer; one of {', '.join(_VOCABULARIES)} is needed.")
    for name in ("config.json", "tokenizer_config.json"):
        if (root / name).exists():
            _refuse_code(root, name)
    from transformers import AutoTokenizer

    with reader_errors(f"{root}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(root, local_files_only=True)


def _refuse_code(root: Path, name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_json(safe_file(root, name))
    if not isinstance(values, dict):
        raise CheckpointError(f"{root / name}: must be an object.")
    if "auto_map" not in values:
        return
    # A model that transformers knows may name code for others; a tokenizer that needs it cannot be had without.
    is_known = name == "config.json" and values.get("model_type") in CONFIG_MAPPING
    if not is_known or "AutoTokenizer" in values["auto_map"]:
        raise CheckpointError(f"{root / name}: the tokenizer comes as code (auto_map), which is never run.")


@contextlib.contextmanager
def reader_errors(what: str) -> Iterator[None]:
    """Turn what transformers and tokenizers raise for a file that they cannot read into a CheckpointError."""
    try:
        yield
    except BitpressError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _broken(what, error) from error
    except Exception as error:
        if type(error) is not Exception:  # the one class that tokenizers raises
            raise
        raise _broken(what, error) from error


def _broken(what: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    return CheckpointError(f"{what}: {lines[0][:300] if lines else type(error).__name__}")
