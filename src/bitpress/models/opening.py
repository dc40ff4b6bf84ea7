"""An original checkpoint as a streamed model: names placed, shapes checked, parameters made on demand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.checkpoints.names import NameMap, map_names
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.devices import CPU
from bitpress.errors import CheckpointError, NumericsError
from bitpress.finite import all_finite
from bitpress.formats import AttentionOperands, CompressedLayer
from bitpress.models.rotated import RotatedNetwork
from bitpress.models.rotating import find_rotated
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel
from bitpress.transforms.rotate import Rotate

__all__ = ["OriginalLoader", "open_original", "open_streamed"]


@dataclass
class OriginalLoader:
    """Makes parameters from a checkpoint and refuses what is not finite, by name.

    config    the configuration of the model that the parameters are of
    rotated   what becomes of them, where the network is rotated
    """

    source: SourceCheckpoint
    names: NameMap
    config: Mapping[str, Any]
    rotated: RotatedNetwork | None = None

    def load(self, prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        tensors = self.names.load(self._read, prefix, exclude)
        if self.rotated is not None:
            self.rotated.apply_(tensors)
        return tensors

    def load_products(self, prefix: str, exclude: str | None = None) -> dict[str, CompressedLayer]:
        return {}

    def load_attention(self, prefix: str = "") -> dict[str, AttentionOperands]:
        return {}

    @property
    def untied(self) -> Mapping[str, str]:
        """Return the parameters that share a tensor of the checkpoint with another one, and no longer in the model."""
        return {} if self.rotated is None else self.rotated.untied

    @property
    def aliases(self) -> dict[str, str]:
        """Return the model's tied parameters, each with the one that it shares."""
        return {alias: original for alias, original in self.names.aliases.items() if alias not in self.untied}

    def stored_bytes(self, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the bytes of every parameter and buffer of the model's state as the source stores it."""
        held = {name: self.source.tensors[source][1].nbytes for name, source in self.names.plain.items()}
        held |= {alias: held[original] for alias, original in self.untied.items() if original in held}
        wanted = {name: value for name, value in state.items() if name not in self.aliases}
        return {name: held.get(name, value.numel() * value.element_size()) for name, value in wanted.items()}

    def untied_bytes(self) -> int:
        """Return the bytes that untied parameters take in the model, and have no tensor for in the source."""
        sizes = {name: self.source.tensors[source][1].nbytes for name, source in self.names.plain.items()}
        return sum(sizes[original] for original in self.untied.values())

    def _read(self, name: str) -> torch.Tensor:
        value = self.source.read(name)
        if not all_finite(value):
            raise NumericsError(f"{self.source.root}: tensor {name!r} holds a NaN or an infinity; repair the checkpoint.")
        return value


def open_original(
    path: Path, dtype: torch.dtype, rotate: Rotate | None = None, *, device: torch.device = CPU
) -> tuple[StreamedModel, OriginalLoader]:
    """Open an uncompressed model for streaming on a device, rotated where that is asked for. Raises CheckpointError."""
    source = SourceCheckpoint.open(path)
    config = build_config(source.config)
    model = StreamedModel(config, None, dtype, device=device, where=str(path))
    entries = {name: entry for name, (_, entry) in source.tensors.items()}
    try:
        # Of a model for several kinds of input, transformers may build the text model alone.
        names = map_names(model.model, entries, source.read, carved=type(model.model.config) is not type(config))
    except CheckpointError as error:
        if not source.config.get("auto_map"):
            raise
        raise CheckpointError(f"{error} The checkpoint comes with code of its own (auto_map), which is never run.") from error
    loader = OriginalLoader(source, names, source.config)
    if rotate is not None:
        rotated, values = find_rotated(source.config, names.aliases, rotate, str(path))
        loader = OriginalLoader(source, names, values, rotated)
        model = StreamedModel(build_config(values), None, dtype, device=device, where=str(path))
    model.loader = loader
    return model, loader


def open_streamed(
    path: Path, dtype: torch.dtype, checkpoint: CompressedCheckpoint | None = None, *, device: torch.device = CPU
) -> StreamedModel:
    """Open any model for streaming on a device: one that bitpress wrote (decoded on the way, on the host) or an original."""
    if checkpoint is None and not is_compressed(path):
        return open_original(path, dtype, device=device)[0]
    checkpoint = CompressedCheckpoint.open(path) if checkpoint is None else checkpoint
    model = StreamedModel(build_config(checkpoint.config), checkpoint, dtype, device=device, where=str(checkpoint.root))
    checkpoint.check_fits(model.model.state_dict())
    return model
