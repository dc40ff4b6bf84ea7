"""A tree of values and arrays in one memory-mapped file: a model in the native engine's layout.

    bytes 0..15     "bitpress-layout\\n"
    bytes 16..23    length of the JSON that follows, little-endian
    JSON            {"tree": ..., "arrays": [{"dtype", "shape", "offset", "sha256"}]}; an array stands in the tree as {"$array": index}
    arrays          each at a multiple of 64 bytes behind the JSON, little-endian, C order

Nothing here imports torch, so that a program that only runs a model starts at once.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bitpress.checkpoints.durable import open_regular, write_durably
from bitpress.checkpoints.jsonfile import parse_json
from bitpress.errors import CheckpointError

__all__ = ["read_prepared", "write_prepared"]

MAGIC = b"bitpress-layout\n"
ALIGNED = 64
# Zeros behind the last array, so that a vector load that begins inside it may end behind it.
TAIL = 4096
DTYPES = ("uint8", "uint16", "int32", "int64", "float32")
REBUILT = "delete the file, it will be rebuilt"


def write_prepared(path: Path, tree: Any) -> int:
    """Write a tree of dictionaries, lists, plain values and numpy arrays; return its size in bytes. Raises DiskError."""
    arrays: list[np.ndarray] = []
    plain = _take_out(tree, arrays)
    entries, offset = [], 0
    for array in arrays:
        entries.append(
            {
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "offset": offset,
                "sha256": _sha256(array),
            }
        )
        offset += _aligned(array.nbytes)
    header = json.dumps({"tree": plain, "arrays": entries}, separators=(",", ":"), allow_nan=False).encode()

    def chunks() -> Iterator[bytes | memoryview]:
        start = MAGIC + len(header).to_bytes(8, "little") + header
        yield start + bytes(-len(start) % ALIGNED)
        for array in arrays:
            yield array.reshape(-1).view(np.uint8).data
            yield bytes(-array.nbytes % ALIGNED)
        yield bytes(TAIL)

    return write_durably(path, chunks())[0]


def read_prepared(path: Path, *, verify: bool = True, threads: int = 1) -> Any:
    """Map a file that `write_prepared` wrote; arrays are read-only views of it. `verify` compares every array's SHA-256.

    Raises CheckpointError for a damaged file or a file of another kind.
    """
    with open_regular(path) as (descriptor, size):
        if size < len(MAGIC) + 8 + TAIL:
            raise CheckpointError(f"{path}: the cached layout is cut short; {REBUILT}.")
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[len(MAGIC) : len(MAGIC) + 8], "little")
    start = len(MAGIC) + 8
    if mapped[: len(MAGIC)] != MAGIC or length > size - start - TAIL:
        raise CheckpointError(f"{path}: this is no cached layout of bitpress, or it is cut short; {REBUILT}.")
    header = parse_json(mapped[start : start + length], str(path))
    if not isinstance(header, dict) or set(header) != {"tree", "arrays"} or not isinstance(header["arrays"], list):
        raise CheckpointError(f"{path}: the cached layout has an invalid header; {REBUILT}.")
    first = _aligned(start + length)
    whole = np.frombuffer(mapped, np.uint8)
    arrays = [_view(path, whole[first : size - TAIL], entry) for entry in header["arrays"]]
    if verify:
        with ThreadPoolExecutor(max(threads, 1)) as pool:  # hashing releases the interpreter's lock
            same = pool.map(lambda array, entry: _sha256(array) == entry["sha256"], arrays, header["arrays"])
            if not all(same):
                raise CheckpointError(f"{path}: the cached layout is damaged, its SHA-256 differs; {REBUILT}.")
    return _put_back(path, header["tree"], arrays)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _take_out(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        assert value.dtype.name in DTYPES, value.dtype
        arrays.append(np.ascontiguousarray(value))
        return {"$array": len(arrays) - 1}
    if isinstance(value, Mapping):
        return {str(key): _take_out(part, arrays) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(part, arrays) for part in value]
    return value


def _put_back(path: Path, value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$array"}:
            index = value["$array"]
            if type(index) is not int or not 0 <= index < len(arrays):
                raise CheckpointError(f"{path}: the cached layout refers to an array that it does not hold; {REBUILT}.")
            return arrays[index]
        return {key: _put_back(path, part, arrays) for key, part in value.items()}
    return [_put_back(path, part, arrays) for part in value] if isinstance(value, list) else value


def _view(path: Path, data: np.ndarray, entry: Any) -> np.ndarray:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "offset", "sha256"} or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: the cached layout has an invalid array entry; {REBUILT}.")
    shape, offset = entry["shape"], entry["offset"]
    if not isinstance(shape, list) or any(type(d) is not int or d < 0 for d in (*shape, offset)) or offset % ALIGNED:
        raise CheckpointError(f"{path}: the cached layout has an invalid array entry; {REBUILT}.")
    dtype = np.dtype(entry["dtype"])
    size = dtype.itemsize
    for d in shape:
        size *= d
    if offset + size > len(data):
        raise CheckpointError(f"{path}: the cached layout is cut short; {REBUILT}.")
    return data[offset : offset + size].view(dtype).reshape(shape)
