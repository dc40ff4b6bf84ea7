"""Where the parameters of a streamed model come from."""

from collections.abc import Mapping
from typing import Protocol

import torch

from bitpress.formats import AttentionOperands, CompressedLayer

__all__ = ["ParameterLoader"]


class ParameterLoader(Protocol):
    """Where parameters come from: an original checkpoint, or a compressed one decoded on the way."""

    def load(self, prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        """Return every parameter and buffer whose name begins with `prefix` but not with `exclude`."""
        ...

    def load_products(self, prefix: str, exclude: str | None = None) -> Mapping[str, CompressedLayer]:
        """Return the layers whose inputs are rounded, by the names of their weights, chosen as in `load`; decoded weights alone would not round."""
        ...

    def load_attention(self, prefix: str = "") -> Mapping[str, AttentionOperands]:
        """Return how modules below a prefix round the operands of their attention, by the modules' names."""
        ...
