"""GGUF models that were split into several files, as `llama-gguf-split` does.

    model-00001-of-00003.gguf    split.no 0, split.count 3, split.tensors.count; all other metadata, and the first tensors or none
    model-00002-of-00003.gguf    split.no 1, the same counts; further tensors

All parts are read as one model, whichever part you name. They are joined, unchanged, when one file is needed.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.checkpoints.gguf_header import GgufHeader, read_gguf_header
from bitpress.errors import CheckpointError

__all__ = ["find_parts", "hash_of_parts", "join_parts"]

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_COPIED = 2**24


def find_parts(path: Path) -> tuple[tuple[Path, GgufHeader], ...]:
    """Return all files of the model that a GGUF file belongs to, with their headers. Raises CheckpointError."""
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return ((path, header),)
    number = header.metadata.get("split.no")
    named = _NAME.fullmatch(path.name)
    if named is None or type(number) is not int or (int(named[2]), int(named[3])) != (number + 1, count):
        shown = number + 1 if type(number) is int else "one"
        raise CheckpointError(
            f"{path}: is part {shown} of {count} of a model, but its name does not say so; "
            f"name the parts NAME-00001-of-{count:05d}.gguf and so on, in one folder."
        )
    paths = [path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count} of a model, and {', '.join(missing[:3])}{more} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it; put all parts into one folder."
        )
    parts = tuple((part, header if part == path else read_gguf_header(part)) for part in paths)
    _check(parts, count)
    return parts


def hash_of_parts(hashes: Sequence[str]) -> str:
    """Return the hash of a single file as it is, and one hash for those of several."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def join_parts(parts: Sequence[tuple[Path, GgufHeader]], target: Path) -> None:
    """Write one file with the metadata and tensors of all parts, their bytes as they are. Raises CheckpointError, OSError."""
    first = parts[0][1]
    alignment = first.alignment
    pairs: dict[str, tuple[Path, int, int]] = {}
    for path, header in parts:
        for key, (start, stop) in header.spans.items():
            if not key.startswith("split."):
                pairs.setdefault(key, (path, start, stop))
    infos: list[bytes] = []
    offset = 0
    for _, header in parts:
        for name, tensor in header.tensors.items():
            text = name.encode()
            infos.append(struct.pack(f"<Q{len(text)}sI", len(text), text, len(tensor.shape)))
            infos.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind, offset))
            offset += -(-tensor.nbytes // alignment) * alignment
    with target.open("wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, sum(len(header.tensors) for _, header in parts), len(pairs)))
        for path, start, stop in pairs.values():
            _copy(path, start, stop, out)
        out.writelines(infos)
        out.write(bytes(-out.tell() % alignment))
        for path, header in parts:
            for tensor in header.tensors.values():
                start = header.data_start + tensor.offset
                _copy(path, start, start + tensor.nbytes, out)
                out.write(bytes(-tensor.nbytes % alignment))


def _check(parts: Sequence[tuple[Path, GgufHeader]], count: int) -> None:
    total = parts[0][1].metadata.get("split.tensors.count")
    seen: dict[str, Path] = {}
    for i, (path, header) in enumerate(parts):
        stated = tuple(header.metadata.get(f"split.{key}") for key in ("no", "count", "tensors.count"))
        if stated != (i, count, total):
            raise CheckpointError(
                f"{path}: has split.no, split.count and split.tensors.count {stated}, but this place needs {(i, count, total)}; "
                "it belongs to another model."
            )
        for name in header.tensors:
            if name in seen:
                raise CheckpointError(f"{path}: holds {name[:80]!r}, which {seen[name].name} also holds.")
            seen[name] = path
    if len(seen) != total:
        raise CheckpointError(
            f"{parts[0][0]}: the {count} parts hold {len(seen)} tensors, but split.tensors.count is {total}; a part is wrong or damaged."
        )


def _copy(path: Path, start: int, stop: int, out: BinaryIO) -> None:
    for block in _blocks(path, start, stop):
        out.write(block)


def _blocks(path: Path, start: int, stop: int) -> Iterator[bytearray]:
    with open_regular(path) as (descriptor, _):
        for at in range(start, stop, _COPIED):
            block = bytearray(min(_COPIED, stop - at))
            read_into(path, descriptor, memoryview(block), at)
            yield block
