"""The tables of ecosystems: whose checkpoints can be opened, who can store compressed layers, and what models can leave for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bitpress.checkpoints.source import read_config
from bitpress.errors import CheckpointError
from bitpress.exchange.awq import Awq
from bitpress.exchange.bitpress_directory import BitpressDirectory
from bitpress.exchange.bitsandbytes import Bitsandbytes
from bitpress.exchange.bitsandbytes_int8 import BitsandbytesInt8
from bitpress.exchange.compressed_tensors import CompressedTensors
from bitpress.exchange.export_directory import DirectoryExporter, PlainExporter
from bitpress.exchange.export_gguf import GgufExporter
from bitpress.exchange.gguf import Gguf
from bitpress.exchange.gptq import Gptq
from bitpress.exchange.hqq import Hqq
from bitpress.exchange.mlx import Mlx
from bitpress.exchange.quantized_directory import QuantizedDirectory
from bitpress.exchange.safetensors_directory import SafetensorsDirectory
from bitpress.exchange.source import DirectoryFormat, Ecosystem, Exporter, LayerFormat, Source
from bitpress.exchange.torchao import Torchao

__all__ = [
    "DIRECTORY_FORMATS",
    "ECOSYSTEMS",
    "EXPORTERS",
    "LAYER_FORMATS",
    "READ_ALONE",
    "Directories",
    "find_ecosystem",
    "open_source",
]

# Ways to store compressed layers in directories of safetensors files: a row is all that reading and writing them takes.
DIRECTORY_FORMATS: dict[str, type[DirectoryFormat]] = {
    "awq": Awq,
    "bitsandbytes": Bitsandbytes,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "hqq": Hqq,
    "mlx": Mlx,
}
# The same for what is read and not written.
READ_ALONE: dict[str, type[DirectoryFormat]] = {"bitsandbytes-int8": BitsandbytesInt8, "torchao": Torchao}


@dataclass(frozen=True)
class Directories:
    """The ecosystem of one way to store compressed layers in directories."""

    format: type[DirectoryFormat]

    @property
    def about(self) -> str:
        return self.format.about

    def owns(self, path: Path) -> bool:
        return path.is_dir() and not BitpressDirectory.owns(path) and self.format.claims(read_config(path))

    def open(self, path: Path) -> Source:
        return QuantizedDirectory.open(path, self.format)


ECOSYSTEMS: dict[str, Ecosystem] = {
    "bitpress": BitpressDirectory(),
    "safetensors": SafetensorsDirectory(),
    "gguf": Gguf(),
    **{name: Directories(format) for name, format in (DIRECTORY_FORMATS | READ_ALONE).items()},
}

LAYER_FORMATS: dict[str, type[LayerFormat]] = {"bitpress": BitpressDirectory, "gguf": Gguf, **DIRECTORY_FORMATS}

# What a model can be exported to.
EXPORTERS: dict[str, Exporter] = {
    **{name: DirectoryExporter(format) for name, format in DIRECTORY_FORMATS.items()},
    "gguf": GgufExporter(),
    "bf16": PlainExporter(torch.bfloat16),
    "fp16": PlainExporter(torch.float16),
}


def find_ecosystem(path: Path) -> str | None:
    """Return the name of the ecosystem that owns a path; None if there is none. Raises CheckpointError for a broken checkpoint."""
    owners = [name for name, ecosystem in ECOSYSTEMS.items() if ecosystem.owns(path)]
    assert len(owners) <= 1, f"{path} has several owners"
    return owners[0] if owners else None


def open_source(path: str | Path) -> Source:
    """Open a checkpoint of any ecosystem of the table. Raises CheckpointError for one that none of them owns."""
    owner = find_ecosystem(Path(path))
    if owner is None:
        known = "; ".join(f"{name}: {ecosystem.about}" for name, ecosystem in ECOSYSTEMS.items())
        raise CheckpointError(f"{path}: is no checkpoint that can be read here. These can: {known}.")
    return ECOSYSTEMS[owner].open(Path(path))
