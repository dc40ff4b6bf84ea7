"""Maps as native code takes them, and matrices behind a map in native code.

A step of learning behind a Hadamard matrix spends most of its time in the map on the weight: torch needs 15 to 30 ms for a matrix of
1536 x 576 where additions alone, in vector registers, need 1 to 2.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from bitpress import native
from bitpress.formats.maps.affine import Affine
from bitpress.formats.maps.map import Chain, Map, Permutation, Scale
from bitpress.formats.maps.rotations import Hadamard, Kronecker, hadamard_matrix

__all__ = ["MatrixMap", "foreign_kind", "map_steps"]

MOST_THREADS = 1024
KINDS = (Affine, Hadamard, Kronecker, Permutation, Scale)


def foreign_kind(change: Map) -> str | None:
    """Name the first map of a chain that native code does not know, or None."""
    return next(
        (one.kind for one in (change.maps if isinstance(change, Chain) else [change]) if not isinstance(one, KINDS)), None
    )


@dataclass(frozen=True)
class MatrixMap:
    """A map of rows or columns of matrices: by native code where it knows the map, else by the map itself.

    Results of native code differ from the map's own by rounding alone. They do not depend on the number of threads.
    """

    change: Map
    native: Any

    @classmethod
    def of(cls, change: Map, size: int, device: torch.device) -> "MatrixMap":
        """Return the map of vectors of `size` values; its tensors are on `device`."""
        knows = device.type == "cpu" and native.available() and foreign_kind(change) is None
        steps = map_steps(change) if knows else []
        return cls(change, native.library().MatrixMap(size, steps, native.chosen_path()) if steps else None)

    def rows(self, w: Float[torch.Tensor, "rows columns"], *, transposed: bool) -> Float[torch.Tensor, "rows columns"]:
        """Return every row x as T x, or T' x."""
        return self._mapped(w, "rows", transposed)

    def columns(self, w: Float[torch.Tensor, "rows columns"], *, transposed: bool) -> Float[torch.Tensor, "rows columns"]:
        """Return every column x as T x, or T' x."""
        return self._mapped(w, "columns", transposed)

    def _mapped(self, w: torch.Tensor, axis: Literal["rows", "columns"], transposed: bool) -> torch.Tensor:
        if self.native is None or w.dtype != torch.float32:
            x = w if axis == "rows" else w.T
            y = self.change.apply_transposed(x) if transposed else self.change.apply(x)
            return y if axis == "rows" else y.T
        x = w.detach().contiguous()
        y = torch.empty_like(x)
        getattr(self.native, axis)(x.numpy(), y.numpy(), transposed, min(torch.get_num_threads(), MOST_THREADS))
        return y


def map_steps(change: Map) -> list[dict[str, Any]]:
    """Return a map as native code takes it: gathers, scales, and products of every block with left ⊗ right."""
    if isinstance(change, Chain):
        steps: list[dict[str, Any]] = []
        for step in (step for part in change.maps for step in map_steps(part)):
            if steps and steps[-1]["kind"] == step["kind"] == "scale":
                steps[-1] = {"kind": "scale", "values": steps[-1]["values"] * step["values"]}
            else:
                steps.append(step)
        return steps
    if isinstance(change, Permutation):
        return [{"kind": "gather", "order": change.order.to(torch.int32).contiguous().numpy()}]
    if isinstance(change, Scale):
        return [_scaling(change.scale)]
    if isinstance(change, (Kronecker, Affine)):
        left, right = _flat(change.left), _flat(change.right)
        across = change.left.shape[0]
        block = across * change.right.shape[0]
        return [{"kind": "mix", "block": block, "across": across, "right": right, **({"left": left} if across > 1 else {})}]
    assert isinstance(change, Hadamard), change.kind
    mix: dict[str, Any] = {"kind": "mix", "block": change.block, "across": change.core}
    if change.core > 1:
        mix["left"] = _flat(hadamard_matrix(change.core))
    return [_scaling(change.factors() / math.sqrt(change.block)), mix]


def _scaling(factors: torch.Tensor) -> dict[str, Any]:
    return {"kind": "scale", "values": _flat(factors)}


def _flat(values: torch.Tensor) -> np.ndarray:
    return values.float().contiguous().flatten().numpy()
