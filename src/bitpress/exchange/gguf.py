"""GGUF files. Every value is dequantized to float32 when the file is opened, by transformers' own reader: codes are not kept."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.gguf_file import load_gguf
from bitpress.errors import CheckpointError
from bitpress.exchange.source import Source
from bitpress.progress import Silent

__all__ = ["Gguf"]


@dataclass(frozen=True)
class _Values:
    """Parameters by the names that transformers has for them."""

    path: Path
    config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.state.keys()

    def read(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise CheckpointError(f"{self.path}: holds no {name!r}.")
        return self.state[name]


class Gguf:
    about: ClassVar[str] = "a .gguf file, dequantized as it is opened"

    @staticmethod
    def owns(path: Path) -> bool:
        return path.is_file() and path.suffix.lower() == ".gguf"

    @staticmethod
    def open(path: Path) -> Source:
        model = load_gguf(path, Silent())
        return _Values(path, model.config.to_dict(), model.state)
