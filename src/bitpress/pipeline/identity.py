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

__all__ = ["identify", "recorded", "versions", "versions_on"]


def identify(source: Mapping[str, str], calibration: str | None, method: Method, device: torch.device = CPU) -> dict[str, Any]:
    """Return the identity of a compressed model from the hashes of the source's files and of the calibration tokens."""
    return {
        "source": dict(source),
        "calibration": calibration,
        "recipe": recorded(method),
        **versions_on(device),
        "directory": VERSION,
    }


def versions_on(device: torch.device) -> dict[str, object]:
    """Return what an identity says of versions and device: sums are rounded in another order on another kind, which may change bytes.

    The processor is not named.
    """
    return {"versions": versions()} | ({} if device.type == "cpu" else {"device": device.type})


def recorded(method: Method) -> dict[str, Any]:
    """Return the recipe as it is stored: files by their names alone, since a hash identifies what they hold."""
    resolved = method.resolved()
    text = resolved["calibration"]["text"]
    if not text.startswith(("builtin", "hf:")):
        resolved["calibration"]["text"] = Path(text).name
    for part in resolved["transforms"]:
        if part.get("tensors") is not None:
            part["tensors"] = Path(part["tensors"]).name
    return resolved


def versions() -> dict[str, str]:
    return {"bitpress": __version__, "torch": torch.__version__, "transformers": version("transformers")}
