"""An original checkpoint as a streamed model: names placed, shapes checked, parameters made on demand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.checkpoints.names import NameMap, map_names
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.errors import CheckpointError, NumericsError
from bitpress.finite import all_finite
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel

__all__ = ["OriginalLoader", "open_original", "open_streamed"]


@dataclass
class OriginalLoader:
    """Makes parameters from a checkpoint and refuses what is not finite, by name."""

    source: SourceCheckpoint
    names: NameMap

    def load(self, prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        return self.names.load(self._read, prefix, exclude)

    def stored_bytes(self, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the bytes of every parameter and buffer of the model's state as the source stores it."""
        held = {name: self.source.tensors[source][1].nbytes for name, source in self.names.plain.items()}
        wanted = {name: value for name, value in state.items() if name not in self.names.aliases}
        return {name: held.get(name, value.numel() * value.element_size()) for name, value in wanted.items()}

    def _read(self, name: str) -> torch.Tensor:
        value = self.source.read(name)
        if not all_finite(value):
            raise NumericsError(f"{self.source.root}: tensor {name!r} holds a NaN or an infinity; repair the checkpoint.")
        return value


def open_original(path: Path, dtype: torch.dtype) -> tuple[StreamedModel, OriginalLoader]:
    """Open an uncompressed model for streaming. Raises CheckpointError."""
    source = SourceCheckpoint.open(path)
    config = build_config(source.config)
    model = StreamedModel(config, None, dtype, where=str(path))
    entries = {name: entry for name, (_, entry) in source.tensors.items()}
    try:
        # Of a model for several kinds of input, transformers may build the text model alone.
        names = map_names(model.model, entries, source.read, carved=type(model.model.config) is not type(config))
    except CheckpointError as error:
        if not source.config.get("auto_map"):
            raise
        raise CheckpointError(f"{error} The checkpoint comes with code of its own (auto_map), which is never run.") from error
    loader = OriginalLoader(source, names)
    model.loader = loader
    return model, loader


def open_streamed(path: Path, dtype: torch.dtype, checkpoint: CompressedCheckpoint | None = None) -> StreamedModel:
    """Open any model for streaming: one that bitpress wrote (decoded on the way) or an original."""
    if checkpoint is None and not is_compressed(path):
        return open_original(path, dtype)[0]
    checkpoint = CompressedCheckpoint.open(path) if checkpoint is None else checkpoint
    model = StreamedModel(build_config(checkpoint.config), checkpoint, dtype, where=str(checkpoint.root))
    checkpoint.check_fits(model.model.state_dict())
    return model
