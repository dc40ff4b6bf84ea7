"""Which tensors of a published model belong to which compressed weight, and to which attention whose operands are rounded."""

from collections.abc import Mapping
from pathlib import Path

from bitpress.checkpoints.records import Manifest
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import BitpressError, CheckpointError
from bitpress.formats import AttentionOperands, CompressedLayer, Expected

__all__ = ["Claimed", "claim_tensors"]

Claimed = dict[str, tuple[str, ...]]


def claim_tensors(root: Path, manifest: Manifest, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> tuple[Claimed, Claimed]:
    """Match every compressed weight, and every rounded attention, with the tensors that its specification implies."""
    owners: dict[str, str] = {}
    claimed: Claimed = {}
    operands: Claimed = {}
    for name, record in manifest.weights.items():
        if name in tensors:
            raise CheckpointError(f"{root}: {name!r} is stored both compressed and as it is.")
        try:
            expected = CompressedLayer.expected(record.spec, record.input)
            parameter = record.parameter(name)
        except BitpressError as error:
            raise CheckpointError(f"{root}: {name}: {error}") from error
        claimed[name] = _take(root, name, parameter.stem, expected, tensors, owners)
    for name, spec in manifest.attention.items():
        try:
            expected = AttentionOperands.expected(spec)
        except BitpressError as error:
            raise CheckpointError(f"{root}: {name}: {error}") from error
        operands[name] = _take(root, name, name, expected, tensors, owners)
    return claimed, operands


def _take(
    root: Path,
    name: str,
    stem: str,
    expected: Expected,
    tensors: Mapping[str, tuple[Path, TensorEntry]],
    owners: dict[str, str],
) -> tuple[str, ...]:
    """Return the full names of the tensors of `name`, dtype and shape checked; each has one owner."""
    for leaf, (dtype, shape) in expected.items():
        full = f"{stem}.{leaf}"
        if full in owners:
            raise CheckpointError(f"{root}: {full!r} is claimed by {owners[full]} and by {name}.")
        if full not in tensors:
            raise CheckpointError(f"{root}: {name}: the tensor {full!r} is missing.")
        entry = tensors[full][1]
        if entry.torch_dtype != dtype or entry.shape != shape:
            got = f"{entry.torch_dtype} {list(entry.shape)}"
            raise CheckpointError(f"{root}: {full!r} is {got}, the specification needs {dtype} {list(shape)}.")
        owners[full] = name
    return tuple(f"{stem}.{leaf}" for leaf in expected)
