"""Directories that other tools quantized, read layer by layer: safetensors files, and a config.json that says how layers are stored."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.named import known_hash
from bitpress.checkpoints.parameter import stem
from bitpress.checkpoints.safetensors_file import TensorEntry, read_tensor
from bitpress.checkpoints.side_files import read_side_file
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.errors import BitpressError, CheckpointError
from bitpress.exchange.source import HEADERS, DirectoryFormat, ReadTensor, StoredLayer
from bitpress.formats import CompressedLayer

__all__ = ["QuantizedDirectory"]


@dataclass(frozen=True)
class QuantizedDirectory:
    """A directory of one tool.

    layers   tensors of every compressed layer below the layer's name, by the layer's name
    entries  what the configuration says of it
    stacks   layers that are stored in one with those of other experts: the name of the whole, and the place in it
    """

    source: SourceCheckpoint
    format: type[DirectoryFormat]
    layers: Mapping[str, Mapping[str, TensorEntry]]
    entries: Mapping[str, Mapping[str, Any]]
    stacks: Mapping[str, tuple[str, int]]

    @classmethod
    def open(cls, path: str | Path, format: type[DirectoryFormat]) -> "QuantizedDirectory":
        """Open a directory, and check its headers and its configuration. Raises CheckpointError."""
        source = SourceCheckpoint.open(path, quantized=True)
        layers = _find_layers({name: entry for name, (_, entry) in source.tensors.items()}, format)
        try:
            entries = format.entries({**source.config, HEADERS: source.said}, layers)
        except BitpressError as error:
            raise CheckpointError(f"{source.root / 'config.json'}: {error}") from error
        stacks = _find_stacks(source, format)
        wholes = {whole for whole, _ in stacks.values()}
        alone = {name: its for name, its in layers.items() if name not in wholes}
        for name, (whole, _) in stacks.items():
            if name in alone:
                raise CheckpointError(f"{source.root}: {name!r} is stored both alone and with the other experts.")
            if whole in layers:
                alone[name] = {leaf: replace(entry, shape=entry.shape[1:]) for leaf, entry in layers[whole].items()}
        return cls(source, format, alone, {n: entries[stacks[n][0] if n in stacks else n] for n in alone}, stacks)

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
        wholes = {whole for whole, _ in self.stacks.values()}
        owned = {f"{layer}.{leaf}" for layer, tensors in self.layers.items() for leaf in tensors}
        plain = {
            name: entry
            for name, (_, entry) in self.source.tensors.items()
            if name not in owned and name.rpartition(".")[0] not in wholes
        }
        for layer, (whole, _) in self.stacks.items():
            if layer not in self.layers:
                for name in self._leaves(whole):
                    entry = self.source.tensors[f"{whole}.{name}"][1]
                    plain[f"{layer}.{name}"] = TensorEntry(f"{layer}.{name}", entry.dtype, entry.shape[1:], 0, 0)
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
            if name not in self.parameters:
                raise CheckpointError(f"{self.root}: holds no {name!r}.")
            owner, _, leaf = name.rpartition(".")
            return self._reader(owner)(leaf) if owner in self.stacks else self.source.read(name)
        read = self._reader(layer)
        tensors = {leaf: read(leaf) for leaf in self.layers[layer]}
        try:
            return self.format.read(StoredLayer(tensors, self.entries[layer]))
        except BitpressError as error:
            raise CheckpointError(f"{self.root}: {layer}: {error}") from error

    def _reader(self, layer: str) -> ReadTensor:
        def read(leaf: str) -> torch.Tensor:
            if layer not in self.stacks:
                return self.source.read(f"{layer}.{leaf}")
            whole, expert = self.stacks[layer]
            return read_tensor(*self.source.tensors[f"{whole}.{leaf}"], slice(expert, expert + 1))[0]

        return read

    def _leaves(self, whole: str) -> list[str]:
        return [name.removeprefix(f"{whole}.") for name in self.source.tensors if name.rpartition(".")[0] == whole]


def _find_stacks(source: SourceCheckpoint, format: type[DirectoryFormat]) -> dict[str, tuple[str, int]]:
    """Return the layers that are stored together: the name of the whole, and the place in it. Raises CheckpointError."""
    counts: dict[str, set[int]] = {}
    for name, (_, entry) in source.tensors.items():
        whole = name.rpartition(".")[0]
        if format.stacks.layers(whole) is not None:
            counts.setdefault(whole, set()).add(entry.shape[0] if len(entry.shape) == 3 else 0)
    found: dict[str, tuple[str, int]] = {}
    for whole, numbers in counts.items():
        if len(numbers) > 1 or 0 in numbers:
            raise CheckpointError(f"{source.root}: {whole}: its tensors are not those of one number of experts.")
        pattern = format.stacks.layers(whole)
        assert pattern is not None
        found |= {pattern.replace("{e}", str(expert)): (whole, expert) for expert in range(numbers.pop())}
    return found


def _find_layers(tensors: Mapping[str, TensorEntry], format: type[DirectoryFormat]) -> dict[str, dict[str, TensorEntry]]:
    """Return the compressed layers among tensors: those that have all the tensors which mark one."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        for suffix in format.suffixes:
            if name.endswith(f".{suffix}"):
                found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = entry
    return {layer: parts for layer, parts in found.items() if format.marks <= parts.keys()}
