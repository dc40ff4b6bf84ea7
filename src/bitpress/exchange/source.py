"""What an ecosystem is: how its checkpoints are recognised and opened as a `Source`, and how it stores one compressed layer.

A source returns parameters by name, a tensor or a `CompressedLayer`; conventions of other tools are converted as they are read. Writing is
pure: `write` returns what is stored, and `read` makes the same layer of that again.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.hub_names import HubNames
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.exchange.expert_names import Stacks
from bitpress.formats import CompressedLayer
from bitpress.progress import Progress

__all__ = [
    "HEADERS",
    "DirectoryFormat",
    "Ecosystem",
    "Exporter",
    "Fate",
    "Fates",
    "ForeignSource",
    "LayerFormat",
    "ReadTensor",
    "Source",
    "StoredLayer",
    "Target",
]


class Source(Protocol):
    """A checkpoint that is open: its parameters, one at a time."""

    @property
    def names(self) -> Collection[str]: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Return transformers' configuration of the model, without what it says of how weights are stored."""
        ...

    def read(self, name: str) -> torch.Tensor | CompressedLayer:
        """Return a parameter as it is stored. Raises CheckpointError."""
        ...


class ForeignSource(Source, Protocol):
    """A checkpoint that another tool quantized."""

    @property
    def parameters(self) -> Mapping[str, TensorEntry]:
        """Return name, type and shape of every parameter, those of a compressed layer as if it were stored plainly."""
        ...

    def hashes(self) -> Mapping[str, str]:
        """Return the SHA-256 of every file that decides what the model computes."""
        ...

    def side_files(self) -> Mapping[str, bytes]:
        """Return the files that go with the model, such as its tokenizer, by their names."""
        ...


class Ecosystem(Protocol):
    """The checkpoints of one tool."""

    @property
    def about(self) -> str: ...

    def owns(self, path: Path) -> bool:
        """Claim that a path is a checkpoint of this ecosystem and of no other. Raises CheckpointError for a broken one."""
        ...

    def open(self, path: Path) -> Source:
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
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        """Return why the tool cannot hold a layer of these specifications bit for bit; None if it can."""
        ...

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        """Return what is stored for a layer. Raises FormatError for one that `refuses` refuses."""
        ...

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        """Return the layer. Raises FormatError or UsageError if the stored tensors do not make one."""
        ...


@dataclass(frozen=True)
class Fate:
    """What becomes of one compressed weight in an export.

    how     exact: its codes are carried over; decoded: its values are stored in 16 bits; rounded: quantized again, into `format`
    why     why it is not exact
    """

    how: Literal["exact", "decoded", "rounded"]
    format: str | None = None
    why: str | None = None


Fates = Mapping[str, Fate]


class Target(LayerFormat, Protocol):
    """An ecosystem that layers can leave for.

    tables      whether it reads compressed tables, whose rows are looked up
    transposed  whether it reads compressed weights of modules that hold theirs transposed (`Conv1D`)
    experts     whether it reads compressed experts
    """

    tables: ClassVar[bool]
    transposed: ClassVar[bool]
    experts: ClassVar[bool]

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        """Return the format of most use with at most about so many bits that holds a weight `[out, in]`; None if there is none."""
        ...


class Exporter(Protocol):
    """A way for a whole model to leave. `target`: where its layers go; None if every weight is decoded into 16 bits."""

    @property
    def about(self) -> str: ...

    @property
    def target(self) -> "type[Target] | None": ...

    @property
    def is_file(self) -> bool: ...

    def export(
        self, checkpoint: CompressedCheckpoint, target: Path, fates: Fates, names: HubNames, progress: Progress
    ) -> dict[str, float]:
        """Write a model into an empty directory, or a file that is not there yet; return the relative squared error that values gained.

        `names` are those that the tensors of its parameters get.
        Raises UsageError, DiskError, NumericsError, and FormatError for layers that cannot stand beside each other.
        """
        ...


# Where `DirectoryFormat.entries` finds what the headers of the weight files say, as safetensors calls it; no configuration has such a key.
HEADERS = "__metadata__"

ReadTensor = Callable[[str], torch.Tensor]


class DirectoryFormat(Target, Protocol):
    """How one tool stores compressed layers in a directory of safetensors files and a config.json.

    marks      names, below a layer's, of the tensors that together tell a compressed layer from a plain one
    suffixes   names of all tensors that a compressed layer may have, its bias apart
    stacks     endings of the names of tensors that hold a layer of all experts, by those of the layers; none: each has its own
    """

    about: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    suffixes: ClassVar[frozenset[str]]
    stacks: ClassVar[Stacks]

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        """Whether a configuration says that its weights are stored in this way."""
        ...

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        """Return what a configuration says of each of these layers, which come with their tensors below their names.

        Under `HEADERS` the configuration holds what the headers of the weight files say.

        Raises FormatError for a version or a setting that is not known, by name.
        """
        ...

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        """Return the shape `[out, in]` of a layer's weight. Raises FormatError for tensors that have none.

        `read` reads one of these tensors, for a tool that stores the shape in one.
        """
        ...

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        """Return a model's configuration with what it must say so that the tool reads layers of these entries.

        `plain` names the other layers: those whose weight is a matrix that is stored as it is.
        """
        ...

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration without what it says of how weights are stored."""
        ...
