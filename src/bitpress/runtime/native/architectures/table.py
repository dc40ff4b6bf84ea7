"""The architectures that the native engine runs, by `model_type`."""

from typing import Any

from bitpress.runtime.native.architectures.layout import Architecture, Layout
from bitpress.runtime.native.architectures.llama import LLAMA_FAMILY

__all__ = ["ARCHITECTURES", "RULES", "describe", "refusal"]

# Part of the name of a cached layout: raise it when the same configuration is described in another way, so that old layouts are rebuilt.
RULES = 3

ARCHITECTURES: dict[str, Architecture] = {**LLAMA_FAMILY}


def refusal(config: Any) -> str | None:
    """Say in a few words why the native decoder cannot run a configuration, or None."""
    if config.model_type not in ARCHITECTURES:
        return f"architecture {config.model_type!r} is not among {', '.join(ARCHITECTURES)}"
    return ARCHITECTURES[config.model_type].refusal(config)


def describe(config: Any) -> Layout:
    """Describe a model by a configuration that `refusal` accepts."""
    return ARCHITECTURES[config.model_type].describe(config)
