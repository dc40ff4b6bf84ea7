"""Layout, a model's sizes and rotations for the native decoder, and Architecture, the protocol of families of models."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bitpress.runtime.native.architectures.steps import Step

__all__ = ["Architecture", "Layout", "Names", "Rotation"]


@dataclass(frozen=True)
class Rotation:
    frequencies: np.ndarray  # [pairs] float32, radians a position
    factor: float


@dataclass(frozen=True)
class Layout:
    """Everything about a model except its weights. `rope` and `window` have one entry per layer: -1 is no rotation, 0 no window."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocabulary: int
    context: int
    eps: float
    attention_scale: float
    embedding_scale: float
    tanh_gelu: bool
    tied: bool
    rotations: tuple[Rotation, ...]
    rope: tuple[int, ...]
    window: tuple[int, ...]


@dataclass(frozen=True)
class Names:
    """The names in a checkpoint: `layer` with `{}` for the number, and the parameters outside the layers."""

    layer: str = "model.layers.{}"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


class Architecture(Protocol):
    """One family of model types. `describe` is called only for a configuration that `refusal` accepts (returns None for)."""

    def refusal(self, config: Any) -> str | None:
        """Say in a few words why the native decoder cannot run a configuration, or None."""
        ...

    def describe(self, config: Any) -> Layout: ...

    def names(self) -> Names: ...

    def norm_offset(self) -> float:
        """Return what is added to the weights of every norm."""
        ...

    def layer(self, layout: Layout, index: int) -> list[Step]:
        """List the steps of one layer."""
        ...
