"""How a weight sits in a model: as a matrix [out, in], as [in, out], or as a 3-d stack of one matrix per expert."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

__all__ = ["WeightParameter", "stem"]


@dataclass(frozen=True)
class WeightParameter:
    """A parameter that is one weight, or a stack of one weight per expert.

    shape   (out, in) of one weight;  experts: how many there are, 0 for a plain weight;  transposed: stored [in, out]
    """

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    experts: int = 0

    @property
    def stem(self) -> str:
        return stem(self.name)

    @property
    def stacked_shape(self) -> tuple[int, int]:
        """Shape (rows, in) with the rows of all experts below each other."""
        return self.shape[0] * max(self.experts, 1), self.shape[1]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter in the model."""
        matrix = self.shape[::-1] if self.transposed else self.shape
        return (self.experts, *matrix) if self.experts else matrix

    def parts(self) -> list[str]:
        """Name every single weight: the layer's name, or one name an expert."""
        return [f"{self.stem}.{e}" for e in range(self.experts)] if self.experts else [self.stem]

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Give the 2-d tensors in memory, one a part, as they are stored."""
        return list(tensor) if self.experts else [tensor]

    def matrices(self, tensor: torch.Tensor) -> list[Float[torch.Tensor, "out in"]]:
        """Give the weights in the one convention [out, in], float32, one a part."""
        return [(v.T if self.transposed else v).float() for v in self.views(tensor)]

    def restore(self, stacked: Float[torch.Tensor, "rows in"]) -> torch.Tensor:
        """Turn rows below each other back into the parameter's own shape."""
        if not self.experts:
            return stacked.T.contiguous() if self.transposed else stacked
        cube = stacked.reshape(self.experts, *self.shape)
        return cube.transpose(1, 2).contiguous() if self.transposed else cube


def stem(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return parameter.removesuffix(".weight")
