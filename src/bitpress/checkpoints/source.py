"""A source checkpoint: a directory in the Hugging Face layout, read tensor by tensor.

Nothing is mapped into memory and nothing is opened that is not on the allow-list; a header is checked before its data is read.
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.directory import open_directory, read_index, safe_file
from bitpress.checkpoints.durable import hash_file
from bitpress.checkpoints.given import ORIGIN, Given, is_in_cache, read_given
from bitpress.checkpoints.jsonfile import read_foreign_json, read_json
from bitpress.checkpoints.locks import describe_job
from bitpress.checkpoints.manifest import JOB_DIRECTORY, MANIFEST_NAME
from bitpress.checkpoints.safetensors_file import TensorEntry, read_header, read_tensor
from bitpress.checkpoints.side_files import SideFiles, find_side_files
from bitpress.errors import CheckpointError

__all__ = [
    "DEPTHS",
    "SIDE_FILES",
    "WIDTHS",
    "SourceCheckpoint",
    "decode_floats",
    "encode_config",
    "encode_floats",
    "quantization_of",
    "read_config",
]

# Keys of a configuration that say how many blocks a model has, and how wide it is.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "head_dim")
# A size in the configuration may exceed what the tensors show by this factor: blocks may share their weights.
_MOST_BLOCKS, _MOST_TIMES = 4096, 64

# Files beside the weights that transformers opens by their names; others are carried over too (`side_files`).
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
# transformers' way to write, in a configuration, the numbers that JSON lacks: {"__float__": "Infinity"}.
_FLOAT = "__float__"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def read_config(root: Path, *, foreign: bool = True) -> dict[str, Any]:
    """Read config.json as transformers does: an object that names its model_type. Raises CheckpointError.

    `foreign` says that another tool wrote it; otherwise `encode_config` did.
    """
    if not os.path.lexists(root / "config.json"):
        raise CheckpointError(_no_model(root))
    path = safe_file(root, "config.json")
    config = decode_floats(read_foreign_json(path) if foreign else read_json(path, foreign_values=True))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{root / 'config.json'}: holds no model_type; it is not the configuration of a model.")
    return config


def quantization_of(config: Mapping[str, Any]) -> Any:
    """Return what a configuration says of how its weights are quantized, under transformers' key or that of MLX; None if nothing."""
    return config.get("quantization_config", config.get("quantization"))


def _no_model(root: Path) -> str:
    """Say what a directory without config.json is, and what to write instead."""
    if (root / JOB_DIRECTORY).exists():
        return f"{root}: there is no {MANIFEST_NAME}; {describe_job(root / JOB_DIRECTORY)}."
    files = sorted(path.name for path in root.iterdir() if path.suffix.lower() == ".gguf") if root.is_dir() else []
    if files:
        return f"{root}: holds {files[0]} and no config.json; write the file itself: {root / files[0]}."
    return (
        f"{root}: holds no config.json, so it is no model; MODEL is a directory with config.json and safetensors files, "
        "a .gguf file, or a named model (`bitpress models`)."
    )


def encode_config(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of a config.json that transformers and strict readers of JSON read alike."""
    return json.dumps(encode_floats(config), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def decode_floats(value: Any) -> Any:
    """Turn the placeholders for infinities and NaN in a configuration into numbers."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and isinstance(value[_FLOAT], str):
            return _FLOATS.get(value[_FLOAT], value)
        return {key: decode_floats(item) for key, item in value.items()}
    return [decode_floats(item) for item in value] if isinstance(value, list) else value


def encode_floats(value: Any) -> Any:
    """Turn infinities and NaN into their placeholders in a configuration."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: encode_floats(item) for key, item in value.items()}
    return [encode_floats(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class SourceCheckpoint:
    """Where every tensor of a checkpoint is, its configuration, and what the headers of the weight files say beside their tensors."""

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, TensorEntry]]
    said: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, *, quantized: bool = False) -> "SourceCheckpoint":
        """Open a directory and check every header in it; with `quantized`, one that another tool quantized too. Raises CheckpointError."""
        root = open_directory(path)
        config = read_config(root)
        quantization = quantization_of(config)
        if quantization is not None and not quantized:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise CheckpointError(f"{root}: is quantized already (quant_method {method!r}); use the original model.")
        index = read_index(root, foreign=True)
        tensors: dict[str, tuple[Path, TensorEntry]] = {}
        said: dict[str, str] = {}
        for file in sorted(set(index.values())):
            target = safe_file(root, file)
            entries, metadata = read_header(target)
            said |= metadata
            for name, entry in entries.items():
                if index.get(name) != file:
                    raise CheckpointError(f"{target}: holds {name!r}, but the index places it in another file.")
                tensors[name] = (target, entry)
        _check_sizes(root, config, tensors)
        missing = sorted(set(index) - set(tensors))
        if missing:
            raise CheckpointError(
                f"{root}: the index names {len(missing)} tensors that no file holds, first {missing[0]!r}; complete the download."
            )
        return cls(root, config, tensors, said)

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        file, entry = self.tensors[name]
        return read_tensor(file, entry)

    @property
    def given(self) -> Given | None:
        """Return the file from which the directory was converted, if it was."""
        return read_given(self.root)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.tensors.values())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file and of config.json."""
        files = sorted({file for file, _ in self.tensors.values()} | {self.root / "config.json"})
        return {file.name: hash_file(file) for file in files}

    def side_files(self) -> SideFiles:
        """Find the files that go with the model (tokenizer, chat templates, processors, licence, ...), and those left behind."""
        own = {file.name for file, _ in self.tensors.values()} | ({ORIGIN} if is_in_cache(self.root) else set())
        return find_side_files(self.root, own, SIDE_FILES)


def _check_sizes(root: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[Path, TensorEntry]]) -> None:
    """Raise CheckpointError for sizes that no tensor has, before modules of that size exhaust time or memory."""
    widest = max((max(entry.shape, default=1) for _, entry in tensors.values()), default=1)
    limits = dict.fromkeys(DEPTHS, max(len(tensors), _MOST_BLOCKS)) | dict.fromkeys(
        (*WIDTHS, "vocab_size"), _MOST_TIMES * widest
    )
    for part in (config, config.get("text_config")):
        for key, limit in limits.items():
            value = part.get(key) if isinstance(part, dict) else None
            if isinstance(value, (int, float)) and value > limit:
                raise CheckpointError(
                    f"{root / 'config.json'}: {key} is {value:.6g}, but no tensor of the checkpoint is that large; the configuration is wrong."
                )
