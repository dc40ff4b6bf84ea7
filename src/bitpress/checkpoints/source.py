"""A source checkpoint: a directory in the Hugging Face layout, read tensor by tensor.

Nothing is mapped into memory and nothing is opened that is not on the allow-list; a header is checked before its data is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.directory import open_directory, read_index, safe_file
from bitpress.checkpoints.durable import hash_file
from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.safetensors_file import TensorEntry, read_header, read_tensor
from bitpress.errors import CheckpointError

__all__ = ["SIDE_FILES", "SourceCheckpoint", "read_config"]

# Files beside the weights that belong to a model and are carried over unchanged.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def read_config(root: Path) -> dict[str, Any]:
    """Read config.json: an object that names its model_type. Raises CheckpointError."""
    config = read_json(safe_file(root, "config.json"))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{root / 'config.json'}: holds no model_type; it is not the configuration of a model.")
    return config


@dataclass(frozen=True)
class SourceCheckpoint:
    """Where every tensor of a checkpoint is, and its configuration."""

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, TensorEntry]]

    @classmethod
    def open(cls, path: str | Path) -> "SourceCheckpoint":
        """Open a directory and check every header in it. Raises CheckpointError."""
        root = open_directory(path)
        config = read_config(root)
        if config.get("quantization_config") is not None:
            quantization = config["quantization_config"]
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise CheckpointError(f"{root}: is quantized already (quant_method {method!r}); give the original model.")
        index = read_index(root)
        tensors: dict[str, tuple[Path, TensorEntry]] = {}
        for file in sorted(set(index.values())):
            target = safe_file(root, file)
            entries, _ = read_header(target)
            for name, entry in entries.items():
                if index.get(name) != file:
                    raise CheckpointError(f"{target}: holds {name!r}, which the index does not place there.")
                tensors[name] = (target, entry)
        missing = sorted(set(index) - set(tensors))
        if missing:
            raise CheckpointError(
                f"{root}: the index names {len(missing)} tensors that no file holds, the first is {missing[0]!r}."
            )
        return cls(root, config, tensors)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        file, entry = self.tensors[name]
        return read_tensor(file, entry)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.tensors.values())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file and of config.json."""
        files = sorted({file for file, _ in self.tensors.values()} | {self.root / "config.json"})
        return {file.name: hash_file(file) for file in files}

    def side_files(self) -> dict[str, Path]:
        """Tokenizer, chat template and generation settings, where the model has them."""
        return {name: safe_file(self.root, name) for name in SIDE_FILES if (self.root / name).exists()}
