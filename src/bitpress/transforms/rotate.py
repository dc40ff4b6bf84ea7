"""Rotate the residual stream and the value heads of the whole network, folded into its weights: nothing is left for run time.

A rotation of `kind: given` is read from a file (`transforms.given`), which others may have learned.

Source   Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", and its public code (`rotation_utils.py`); the
         residual stream's rotation is R1, that of value heads R2 in the names of SpinQuant (Liu et al. 2024).
Differs  gains of norms stay in the network as ones. A LayerNorm stays one: the rotation is mirrored so that it leaves the vector of ones
         where it is, which the mean commutes with, and the norm's bias becomes R (b / g), where the code makes RMS norms of them and moves
         the bias into the next layers. Value heads take random signs before their Hadamard matrix. Queries, keys and the input of the
         down projection (R3, R4) are not rotated: that would have to be computed at run time.
Needs    nothing.        Cost  O(log n) operations a weight for `hadamard`, O(n) for `orthogonal`; nothing stored but the head, where the
         embeddings were tied to it.
Update   embeddings R',  w g R' where x is read behind a norm of gain g,  R w where x is added to;  H w_v and w_o H' for every value head
Fails    CheckpointError for a network that is not the same in another basis of its residual stream, with the reason, and for a file
         whose rotation does not fit.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.formats import Hadamard
from bitpress.transforms.basis import generator_of
from bitpress.transforms.given import hash_rotations, read_rotation
from bitpress.transforms.sites import Sites

__all__ = ["Rotate", "Rotation"]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R, as a Hadamard map or as it is, then a reflection along the unit vector `mirror` if there is one."""

    matrix: Hadamard | Float[torch.Tensor, "n n"]
    mirror: Float[torch.Tensor, " n"] | None = None

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """Return R x along the last axis, in float64."""
        x = x.double()
        x = self.matrix.apply(x) if isinstance(self.matrix, Hadamard) else x @ self.matrix.T
        return x if self.mirror is None else x - 2 * (x @ self.mirror)[..., None] * self.mirror


@dataclass(frozen=True)
class Rotate:
    """`residual` and `values` say what is rotated. With kind "given", `tensors` is the file, and `sha256` is that of the file once it is read."""

    kind: Literal["hadamard", "orthogonal", "given"] = "hadamard"
    residual: bool = True
    values: bool = True
    seed: int = 0
    tensors: str | None = field(default=None, metadata={"later": True})
    sha256: str | None = field(default=None, metadata={"later": True})

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {"residual": frozenset({"folded"}), "value": frozenset({"folded"})}
    summary: ClassVar[str] = "random rotation of the residual stream and of value heads, folded into all weights"
    paper: ClassVar[str] = "yardstick: QuaRot"

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "orthogonal", "given"):
            raise UsageError(f"kind={self.kind!r}: it is 'hadamard', 'orthogonal' or 'given'.")
        if type(self.residual) is not bool or type(self.values) is not bool or not (self.residual or self.values):
            raise UsageError("residual and values are true or false, and one of them is true.")
        generator_of(self.seed, "input", 1)
        if (self.kind == "given") != (self.tensors is not None) or (self.tensors is None and self.sha256 is not None):
            raise UsageError("tensors is the file of kind: given, and of no other kind; give both or neither.")
        if self.tensors is not None:
            if self.seed:
                raise UsageError(f"seed={self.seed}: nothing is drawn for kind: given; leave it out.")
            object.__setattr__(self, "sha256", hash_rotations(self.tensors, self.sha256))

    def of_residual(self, width: int, *, centred: bool) -> Rotation:
        """Return the rotation of the residual stream. `centred`: norms subtract means, so that it maps the vector of ones to itself."""
        given = self._given(("residual",), width)
        rotation = _random(self.kind, self.seed, "residual", width) if given is None else given
        if not centred:
            return rotation
        ones = torch.ones(width, dtype=torch.float64)
        away = rotation.apply(ones) - ones
        return rotation if not away.norm() > 1e-6 else Rotation(rotation.matrix, away / away.norm())

    def of_values(self, row: int, block: int | None = None) -> Rotation:
        """Return the rotation of a value head of `row` channels, in a block where each may have its own."""
        given = self._given(("values",) if block is None else (f"values.{block}", "values"), row)
        return _random(self.kind, self.seed, "value", row) if given is None else given

    def _given(self, names: tuple[str, ...], width: int) -> Rotation | None:
        if self.tensors is None or self.sha256 is None:
            return None
        return Rotation(read_rotation(self.tensors, self.sha256, names, width))


@lru_cache(maxsize=4)
def _random(kind: str, seed: int, side: Literal["residual", "value"], width: int) -> Rotation:
    generator = generator_of(seed, side, width)
    if kind == "hadamard":
        return Rotation(Hadamard.random(width, width, generator))
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return Rotation(q * r.diagonal().sign())
