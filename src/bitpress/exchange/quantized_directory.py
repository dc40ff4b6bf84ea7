"""Directories that other tools quantized, read layer by layer: safetensors files, and a config.json that says how layers are stored."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.named import known_hash
from bitpress.checkpoints.parameter import stem
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.checkpoints.side_files import read_side_file
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.errors import BitpressError, CheckpointError
from bitpress.exchange.source import DirectoryFormat, ReadTensor, StoredLayer
from bitpress.formats import CompressedLayer

__all__ = ["QuantizedDirectory"]


@dataclass(frozen=True)
class QuantizedDirectory:
    """A directory of one tool.

    layers   tensors of every compressed layer below the layer's name, by the layer's name
    entries  what the configuration says of it
    """

    source: SourceCheckpoint
    format: type[DirectoryFormat]
    layers: Mapping[str, Mapping[str, TensorEntry]]
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, path: str | Path, format: type[DirectoryFormat]) -> "QuantizedDirectory":
        """Open a directory, and check its headers and its configuration. Raises CheckpointError."""
        source = SourceCheckpoint.open(path, quantized=True)
        layers = _find_layers({name: entry for name, (_, entry) in source.tensors.items()}, format)
        try:
            return cls(source, format, layers, format.entries(source.config, layers))
        except BitpressError as error:
            raise CheckpointError(f"{source.root / 'config.json'}: {error}") from error

    @property
    def root(self) -> Path:
        return self.source.root

    @property
    def config(self) -> Mapping[str, Any]:
        return self.format.plain(self.source.config)

    @property
    def names(self) -> Collection[str]:
        return self.parameters.keys()

    @cached_property
    def parameters(self) -> Mapping[str, TensorEntry]:
        """Return parameters by name: stored tensors, and for a compressed layer an entry of its weight's shape. Raises CheckpointError."""
        owned = {f"{layer}.{leaf}" for layer, tensors in self.layers.items() for leaf in tensors}
        plain = {name: entry for name, (_, entry) in self.source.tensors.items() if name not in owned}
        for layer, tensors in self.layers.items():
            name = f"{layer}.weight"
            if name in plain:
                raise CheckpointError(f"{self.root}: {name!r} is stored both compressed and as it is.")
            try:
                shape = self.format.shape(self.entries[layer], tensors, self._reader(layer))
            except BitpressError as error:
                raise CheckpointError(f"{self.root}: {layer}: {error}") from error
            plain[name] = TensorEntry(name, "BF16", shape, 0, 0)
        return plain

    def hashes(self) -> Mapping[str, str]:
        files = {file for file, _ in self.source.tensors.values()} | {self.root / "config.json"}
        return {file.name: known_hash(file) for file in sorted(files)}

    def side_files(self) -> Mapping[str, bytes]:
        return {name: read_side_file(path) for name, path in self.source.side_files().carried.items()}

    def read(self, name: str) -> torch.Tensor | CompressedLayer:
        """Read one parameter, a compressed one with its codes. Raises CheckpointError."""
        layer = stem(name)
        if layer not in self.layers:
            if name not in self.source.tensors:
                raise CheckpointError(f"{self.root}: holds no {name!r}.")
            return self.source.read(name)
        read = self._reader(layer)
        tensors = {leaf: read(leaf) for leaf in self.layers[layer]}
        try:
            return self.format.read(StoredLayer(tensors, self.entries[layer]))
        except BitpressError as error:
            raise CheckpointError(f"{self.root}: {layer}: {error}") from error

    def _reader(self, layer: str) -> ReadTensor:
        return lambda leaf: self.source.read(f"{layer}.{leaf}")


def _find_layers(tensors: Mapping[str, TensorEntry], format: type[DirectoryFormat]) -> dict[str, dict[str, TensorEntry]]:
    """Return the compressed layers among tensors: those that have all the tensors which mark one."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        for suffix in format.suffixes:
            if name.endswith(f".{suffix}"):
                found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = entry
    return {layer: parts for layer, parts in found.items() if format.marks <= parts.keys()}
