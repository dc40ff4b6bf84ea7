"""What an ecosystem is: how its checkpoints are recognised and opened as a `Source`, and how it stores one compressed layer.

A source returns parameters by name, a tensor or a `CompressedLayer`; conventions of other tools are converted as they are read. Writing is
pure: `write` returns what is stored, and `read` makes the same layer of that again.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from bitpress.formats import CompressedLayer

__all__ = ["Ecosystem", "LayerFormat", "Source", "StoredLayer"]


class Source(Protocol):
    """A checkpoint that is open: its parameters, one at a time."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> torch.Tensor | CompressedLayer:
        """Return a parameter as it is stored. Raises CheckpointError."""
        ...


class Ecosystem(Protocol):
    """The checkpoints of one tool."""

    about: ClassVar[str]

    @staticmethod
    def owns(path: Path) -> bool:
        """Claim that a path is a checkpoint of this ecosystem and of no other. Raises CheckpointError for a broken one."""
        ...

    @staticmethod
    def open(path: Path) -> Source:
        """Open a checkpoint and check it. Raises CheckpointError, MemoryLimitError."""
        ...


@dataclass(frozen=True)
class StoredLayer:
    """One layer as an ecosystem stores it.

    tensors   by their names below the layer's
    entry     what the checkpoint's configuration says of the layer, as JSON
    """

    tensors: Mapping[str, torch.Tensor]
    entry: Mapping[str, Any]


class LayerFormat(Protocol):
    """How one tool stores compressed layers: `read(write(layer))` is the layer."""

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        """Return what is stored for a layer. Raises FormatError for one that the ecosystem cannot hold."""
        ...

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        """Return the layer. Raises FormatError or UsageError if the stored tensors do not make one."""
        ...
