"""Directories in the Hugging Face layout that hold plain tensors, in one safetensors file or in shards with an index."""

from pathlib import Path
from typing import ClassVar

from bitpress.checkpoints.compressed import is_compressed
from bitpress.checkpoints.source import SourceCheckpoint, quantization_of, read_config
from bitpress.exchange.source import Source

__all__ = ["SafetensorsDirectory"]


class SafetensorsDirectory:
    about: ClassVar[str] = "config.json and plain tensors in safetensors files"

    @staticmethod
    def owns(path: Path) -> bool:
        return path.is_dir() and not is_compressed(path) and quantization_of(read_config(path)) is None

    @staticmethod
    def open(path: Path) -> Source:
        return SourceCheckpoint.open(path)
