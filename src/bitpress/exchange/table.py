"""The tables of ecosystems: whose checkpoints can be opened, and who can store compressed layers."""

from pathlib import Path

from bitpress.errors import CheckpointError
from bitpress.exchange.bitpress_directory import BitpressDirectory
from bitpress.exchange.gguf import Gguf
from bitpress.exchange.safetensors_directory import SafetensorsDirectory
from bitpress.exchange.source import Ecosystem, LayerFormat, Source

__all__ = ["ECOSYSTEMS", "LAYER_FORMATS", "open_source"]

ECOSYSTEMS: dict[str, type[Ecosystem]] = {
    "bitpress": BitpressDirectory,
    "safetensors": SafetensorsDirectory,
    "gguf": Gguf,
}

LAYER_FORMATS: dict[str, type[LayerFormat]] = {"bitpress": BitpressDirectory}


def open_source(path: str | Path) -> Source:
    """Open a checkpoint of any ecosystem of the table. Raises CheckpointError for one that none of them owns."""
    path = Path(path)
    owners = [ecosystem for ecosystem in ECOSYSTEMS.values() if ecosystem.owns(path)]
    assert len(owners) <= 1, f"{path} has several owners"
    if not owners:
        known = "; ".join(f"{name}: {ecosystem.about}" for name, ecosystem in ECOSYSTEMS.items())
        raise CheckpointError(f"{path}: is no checkpoint that can be read here. These can: {known}.")
    return owners[0].open(path)
