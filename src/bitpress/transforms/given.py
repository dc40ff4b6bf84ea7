"""Rotations from a file: what was learned or made elsewhere, as tensors of a safetensors file.

    residual      [width, width]          R of the residual stream, x' = R x
    values        [head, head]            of every value head, v' = R v
    values.3      [head, head]            of the value heads of block 3, in the place of `values`

Differs  a matrix that is orthogonal to 1e-2, as one stored in 16 bits is, becomes the nearest orthogonal one in float64 (Newton and Schulz:
         R <- R (3 I - R'R) / 2), so that the network's function stays what it was.
Fails    CheckpointError for a file without the tensor, of another shape or type, or not orthogonal; UsageError for no file, and another one
         than the recipe records.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from bitpress.errors import CheckpointError, UsageError

__all__ = ["hash_rotations", "read_rotation"]

# The largest entry of R R' - I for which a matrix is taken to be a rotation: one of bf16 entries is within a tenth of that.
TOLERANCE = 1e-2


def hash_rotations(path: str, recorded: str | None) -> str:
    """Return the SHA-256 of a file of rotations. Raises UsageError where there is none, or another than the recipe records."""
    if "\0" in path:
        raise UsageError(f"tensors={path!r}: the name holds a NUL character; name a safetensors file of rotations.")
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"tensors={path}: cannot be read ({error.strerror}); name a safetensors file of rotations.") from error
    if recorded is not None and recorded != digest:
        raise UsageError(
            f"tensors={path}: is another file than the recipe records (SHA-256 {digest[:12]}... and not {recorded[:12]}...); take the "
            "recorded file, or leave sha256 out of the recipe."
        )
    return digest


@lru_cache(maxsize=4)
def read_rotation(path: str, digest: str, names: tuple[str, ...], width: int) -> Float[torch.Tensor, "n n"]:
    """Return the rotation of the first of `names` that a file holds, float64. `digest` is the file's SHA-256."""
    try:
        with safe_open(path, "pt") as file:
            held = list(file.keys())
            name = next((name for name in names if name in held), None)
            matrix = None if name is None else file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is no safetensors file: {error}.") from error
    if matrix is None:
        told = ", ".join(held[:4]) or "nothing"
        side = names[-1]
        raise CheckpointError(f"{path}: holds no tensor {' or '.join(names)}, but {told}; add it, or use {side}: false.")
    if tuple(matrix.shape) != (width, width) or not matrix.is_floating_point():
        shape = "x".join(map(str, matrix.shape))
        raise CheckpointError(
            f"{path}: {name} is {shape} of {str(matrix.dtype).removeprefix('torch.')}; a rotation of {width} channels is {width}x{width} floats."
        )
    return _nearest(matrix.double(), f"{path}: {name}")


def _nearest(matrix: Float[torch.Tensor, "n n"], where: str) -> Float[torch.Tensor, "n n"]:
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    away = float((matrix @ matrix.T - eye).abs().max())
    if not away <= TOLERANCE:  # a NaN too
        raise CheckpointError(
            f"{where} is not orthogonal: R R' is up to {away:.2g} away from the identity, and {TOLERANCE:g} is allowed."
        )
    for _ in range(4):  # the distance squares each time
        matrix = matrix @ (1.5 * eye - 0.5 * matrix.T @ matrix)
    return matrix
