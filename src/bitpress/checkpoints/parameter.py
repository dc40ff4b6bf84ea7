"""How a weight sits in a model: as a matrix [out, in], as [in, out], or as a stack of one such matrix per expert."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

__all__ = ["WeightParameter", "stem"]


@dataclass(frozen=True)
class WeightParameter:
    """A parameter that is one weight, or a stack of one weight per expert.

    shape   (out, in) of one weight;  experts: how many there are, 0 for a plain weight;  transposed: stored [in, out]
    flat    a stack whose matrices are stacked along the rows of a 2-d parameter instead of in a 3-d one
    """

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    experts: int = 0
    flat: bool = False

    @property
    def stem(self) -> str:
        return stem(self.name)

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """Return the names that a pattern of `skip` may match. A stack of experts has `experts` in one of them, whatever the model says."""
        parent, _, leaf = self.stem.rpartition(".")
        alike = (f"{parent}.experts.{leaf}",) if self.experts and "experts" not in parent.split(".") else ()
        return (self.stem, self.name, *alike)

    @property
    def stacked_shape(self) -> tuple[int, int]:
        """Return the shape (rows, in) of all experts stacked along the rows."""
        return self.shape[0] * max(self.experts, 1), self.shape[1]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter in the model."""
        rows, columns = self.matrix_shape
        if self.flat:
            return self.experts * rows, columns
        return (self.experts, rows, columns) if self.experts else (rows, columns)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of one weight as it is stored."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def parts(self) -> list[str]:
        """Return the name of every single weight: the layer's name, or one name per expert."""
        return [f"{self.stem}.{e}" for e in range(self.experts)] if self.experts else [self.stem]

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the 2-d tensors in memory, one per part, as stored."""
        return list(tensor.view(self.experts, *self.matrix_shape)) if self.experts else [tensor]

    def matrices(self, tensor: torch.Tensor) -> list[Float[torch.Tensor, "out in"]]:
        """Return the weights as [out, in], float32, one per part."""
        return [(v.T if self.transposed else v).float() for v in self.views(tensor)]

    def restore(self, stacked: Float[torch.Tensor, "rows in"]) -> torch.Tensor:
        """Turn stacked rows back into the parameter's own shape."""
        if not self.experts:
            return stacked.T.contiguous() if self.transposed else stacked
        cube = stacked.reshape(self.experts, *self.shape)
        cube = cube.transpose(1, 2).contiguous() if self.transposed else cube
        return cube.flatten(0, 1) if self.flat else cube


def stem(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return parameter.removesuffix(".weight")
