"""The identity of a result: everything that decides its bytes (source, texts, recipe, versions), as it is stored beside it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.compressed import VERSION
from bitpress.devices import CPU
from bitpress.recipes import Method
from bitpress.version import __version__

__all__ = ["identify", "on_device", "recorded", "versions"]


def identify(source: Mapping[str, str], calibration: str | None, method: Method, device: torch.device = CPU) -> dict[str, Any]:
    """Return the identity of a compressed model from the hashes of the source's files and of the calibration tokens."""
    return {
        "source": dict(source),
        "calibration": calibration,
        "recipe": recorded(method),
        "versions": versions(),
        "directory": VERSION,
        **on_device(device),
    }


def on_device(device: torch.device) -> dict[str, str]:
    """Return what an identity says of the device: sums are rounded in another order on another kind, which may change bytes.

    It says nothing of the processor.
    """
    return {} if device.type == "cpu" else {"device": device.type}


def recorded(method: Method) -> dict[str, Any]:
    """Return the recipe as it is stored: a text file by its name alone, since the hash of its tokens identifies its content."""
    resolved = method.resolved()
    text = resolved["calibration"]["text"]
    if not text.startswith(("builtin", "hf:")):
        resolved["calibration"]["text"] = Path(text).name
    return resolved


def versions() -> dict[str, str]:
    return {"bitpress": __version__, "torch": torch.__version__, "transformers": version("transformers")}
