"""A model within a budget of bytes: load only the first terms of every stack, as many as the budget has room for.

The manifest holds the error of every stack with its first 1, 2, ... terms. `formats.stack_budget` puts all terms of the model into one
order, so that a larger budget only adds terms. The bytes counted are those of all tensors that are read, as stored.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import CheckpointError, MemoryLimitError, UsageError
from bitpress.formats.stack_budget import choose_blocks

__all__ = ["parse_bytes", "within"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]i?)?b?", re.ASCII | re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes: 60000000, "60MB", "1.5GB", "64MiB". Raises UsageError."""
    found = _SIZE.fullmatch(str(size).strip())
    count = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found and not isinstance(size, bool) else 0
    if count < 1:
        raise UsageError(f"memory={size!r}: must be a number of bytes, for example 60MB, 1.5GB or 64MiB.")
    return count


def within(checkpoint: CompressedCheckpoint, memory: int | str) -> CompressedCheckpoint:
    """Return the checkpoint with as many terms of its stacks as fit; the terms that remove the most error per byte come first.

    Raises UsageError if no weight is a stack, MemoryLimitError if even the first terms are too large, and CheckpointError if the
    manifest's errors do not belong to its weights.
    """
    budget = parse_bytes(memory)
    blocks = {name: _blocks(checkpoint, name, record) for name, record in checkpoint.manifest.weights.items() if record.errors}
    if not blocks:
        raise UsageError(
            f"{checkpoint.root}: no weight can be loaded in part; leave out memory, or quantize with the quantizer bitstack."
        )
    errors = {name: checkpoint.manifest.weights[name].errors or [] for name in blocks}
    sizes = {name: [_nbytes(checkpoint, names) for names in parts] for name, parts in blocks.items()}
    in_stacks = sum(map(sum, sizes.values()))
    always = _nbytes(checkpoint, checkpoint.tensors) - in_stacks
    least = always + sum(parts[0] for parts in sizes.values())
    if budget < least:
        raise MemoryLimitError(
            f"{checkpoint.root}: {budget:,} bytes are too few; the model needs {least:,} at least, and {always + in_stacks:,} in full."
        )
    try:
        counts = choose_blocks(errors, sizes, budget - always)
    except UsageError as error:
        raise CheckpointError(f"{checkpoint.root}: {error}") from error
    return _cut(checkpoint, blocks, counts)


def _blocks(checkpoint: CompressedCheckpoint, name: str, record: WeightRecord) -> list[list[str]]:
    """Return the tensors of each term of a stack; its maps go with the first."""
    terms = record.spec["terms"]
    if len(terms) != len(record.errors or ()):
        raise CheckpointError(
            f"{checkpoint.root}: {name}: the manifest has {len(record.errors or ())} errors for {len(terms)} terms."
        )
    stem = record.parameter(name).stem
    parts = [[t for t in checkpoint.stored[name] if t.startswith(f"{stem}.term{k}.")] for k in range(len(terms))]
    parts[0] += [t for t in checkpoint.stored[name] if not t.startswith(f"{stem}.term")]
    return parts


def _nbytes(checkpoint: CompressedCheckpoint, names: Sequence[str] | Mapping[str, object]) -> int:
    return sum(checkpoint.tensors[name][1].nbytes for name in names)


def _cut(
    checkpoint: CompressedCheckpoint, blocks: Mapping[str, list[list[str]]], counts: Mapping[str, int]
) -> CompressedCheckpoint:
    weights, stored = dict(checkpoint.manifest.weights), dict(checkpoint.stored)
    left_out: set[str] = set()
    for name, count in counts.items():
        record = weights[name]
        spec = {**record.spec, "terms": record.spec["terms"][:count]}
        weights[name] = record.model_copy(update={"spec": spec, "errors": (record.errors or [])[:count]})
        behind = {t for part in blocks[name][count:] for t in part}
        stored[name] = tuple(t for t in stored[name] if t not in behind)
        left_out |= behind
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name not in left_out}
    manifest = checkpoint.manifest.model_copy(update={"weights": weights})
    return replace(checkpoint, manifest=manifest, stored=stored, tensors=tensors, cut=True)
