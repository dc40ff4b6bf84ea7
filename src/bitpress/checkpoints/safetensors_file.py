"""The safetensors file: every check before a byte is used, and writing as a stream.

    byte 0      n: length of the header, unsigned 64 bits, little endian        here at most 16 MiB
    byte 8      header: n bytes of JSON in UTF-8, '{' first, spaces at the end as padding
                {"__metadata__": {"key": "text", ...},                          optional
                 "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    byte 8+n    data: tensors in row-major order, little endian; data_offsets count from here, [begin, end)
    end         the last tensor ends where the file ends

The regions of all tensors, sorted, are contiguous and disjoint and cover the data exactly: no byte has two meanings and
none has no meaning. A file that breaks a rule is a CheckpointError. Stricter than the reference reader: unknown and
repeated keys, empty dimensions, more than 16 dimensions, control characters in names and booleans other than 0 and 1
are refused too.

Tensors are read with preadv into fresh memory and never mapped: mapped pages count as resident, and a file that is cut
short while mapped reads as zeros or kills the process.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.checkpoints.jsonfile import parse_json
from bitpress.errors import CheckpointError, MemoryLimitError, UsageError

__all__ = [
    "MAX_HEADER_BYTES",
    "TORCH_DTYPES",
    "TensorEntry",
    "TensorsOnDisk",
    "check_tensor_name",
    "read_header",
    "read_tensor",
    "serialize",
]

MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 512
_METADATA = "__metadata__"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ALIGNMENT = 8  # of the data in the file: the size of the largest dtype

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES_OF_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header; return the entries in the order of their data, and the metadata."""
    with open_regular(path) as (descriptor, num_bytes):
        if num_bytes < 8:
            raise CheckpointError(
                f"{path}: has {num_bytes} bytes, fewer than the 10 of the smallest safetensors file; copy it again."
            )
        prefix = bytearray(8)
        read_into(path, descriptor, memoryview(prefix), 0)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise CheckpointError(
                f"{path}: the header claims {header_bytes} bytes; the file has {num_bytes - 8} after its length, "
                f"and at most {MAX_HEADER_BYTES} are read. The file is cut short or is not safetensors."
            )
        data = bytearray(header_bytes)
        read_into(path, descriptor, memoryview(data), 8)
    if data[:1] != b"{":
        raise CheckpointError(f"{path}: the header does not begin with '{{'; the file is not safetensors.")
    header = parse_json(bytes(data), str(path), MAX_HEADER_BYTES)
    metadata = _checked_metadata(path, header.pop(_METADATA, None))
    entries = [_checked_entry(path, name, fields, 8 + header_bytes) for name, fields in header.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_cover(path, entries, 8 + header_bytes, num_bytes)
    return {entry.name: entry for entry in entries}, metadata


def read_tensor(path: Path, entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
    """Read one tensor, or a contiguous range `rows` of its first dimension, into fresh memory."""
    if entry.nbytes != entry.numel * entry.torch_dtype.itemsize:
        raise CheckpointError(f"{path}: {entry.name}: {entry.nbytes} bytes do not match {entry.dtype} {list(entry.shape)}.")
    shape, start, num_bytes = entry.shape, entry.start, entry.nbytes
    if rows is not None:
        first, stop = _checked_rows(entry, rows)
        row_bytes = num_bytes // entry.shape[0]
        shape = (stop - first, *entry.shape[1:])
        start, num_bytes = entry.start + first * row_bytes, (stop - first) * row_bytes
    with open_regular(path) as (descriptor, file_bytes):
        if entry.end > file_bytes:  # before the allocation
            raise CheckpointError(
                f"{path}: {entry.name}: ends at byte {entry.end}, but the file has {file_bytes}; copy it again."
            )
        try:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:  # what torch raises when malloc fails
            raise MemoryLimitError(f"{path}: {entry.name}: no memory for {num_bytes} bytes.") from error
        read_into(path, descriptor, buffer.numpy().data, start)
    if entry.dtype == "BOOL" and num_bytes and int(buffer.max()) > 1:
        raise CheckpointError(f"{path}: {entry.name}: a boolean byte is neither 0 nor 1.")
    return buffer.view(entry.torch_dtype).reshape(shape)


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Check everything now, then yield the bytes of the file, one tensor at a time, for `write_durably`.

    Equal tensors and metadata give equal bytes. Larger dtypes come first, then names in order, and the header is padded
    to 8 bytes, so that every tensor is aligned. Raises UsageError for values that the format cannot
    hold, and CheckpointError for a name that `read_header` would refuse.
    """
    checked_metadata = _storable_metadata(metadata or {})
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: checked_metadata} if checked_metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        dtype = _NAMES_OF_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(f"safetensors: the header has {len(text)} bytes, the limit is {MAX_HEADER_BYTES}; use more shards.")
    return _stream(len(text).to_bytes(8, "little") + text, [tensors[name] for name in names])


def check_tensor_name(where: str, name: str) -> None:
    """Raise CheckpointError for a tensor name that is empty, too long, or has control characters or half a surrogate pair."""
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise CheckpointError(f"{where}: a tensor name has {len(name)} characters; 1 to {MAX_NAME_LENGTH} are allowed.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise CheckpointError(f"{where}: the tensor name {name!r} holds control characters or half a surrogate pair.")


def _stream(head: bytes, tensors: list[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        # One element may pass for contiguous with any stride, and then cannot be seen as bytes.
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
        yield flat.view(torch.uint8).numpy().data


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:  # left out, or null, as MLX writes it
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: {_METADATA} must be an object of strings.")
    return metadata


def _checked_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    check_tensor_name(str(path), name)
    where = f"{path}: {name}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: an entry must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r} is unknown; known: {', '.join(TORCH_DTYPES)}.")
    if not isinstance(shape, list) or not _is_shape(shape):
        raise CheckpointError(f"{where}: shape must be at most {MAX_DIMENSIONS} integers from 1 to 2**31-1.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_within(value, 0, 2**63) for value in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two integers, begin and end.")
    begin, end = offsets
    needed = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != needed:
        raise CheckpointError(f"{where}: data_offsets span {end - begin} bytes, but {dtype} {shape} needs {needed}.")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_shape(shape: Sequence[Any]) -> bool:
    return len(shape) <= MAX_DIMENSIONS and all(_is_within(dim, 1, 2**31) for dim in shape)


def _is_within(value: Any, low: int, stop: int) -> bool:
    return type(value) is int and low <= value < stop  # type(): True is an int, but not a number here


def _check_cover(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    expected = data_start
    for entry in entries:  # none is empty, so that sorted starts mean sorted ends
        if entry.start != expected:
            kind = "overlap" if entry.start < expected else "leave a gap"
            raise CheckpointError(
                f"{path}: {entry.name}: begins at byte {entry.start} instead of {expected}; the regions {kind}."
            )
        expected = entry.end
    if expected != file_bytes:
        raise CheckpointError(
            f"{path}: the tensors end at byte {expected}, but the file has {file_bytes}; it is cut short or has a tail."
        )


def _checked_rows(entry: TensorEntry, rows: slice) -> tuple[int, int]:
    num_rows = entry.shape[0] if entry.shape else 0
    first = 0 if rows.start is None else rows.start
    stop = num_rows if rows.stop is None else rows.stop
    if not entry.shape or rows.step not in (None, 1) or not 0 <= first <= stop <= num_rows:
        raise UsageError(f"{entry.name}: {rows} is not a contiguous range of rows of the shape {list(entry.shape)}.")
    return first, stop


def _storable_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str) or _SURROGATE.search(key + text):
            raise UsageError(f"safetensors: metadata must be valid strings, got {key!r}: {type(text).__name__}.")
    return dict(sorted(metadata.items()))


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    check_tensor_name("safetensors", name)
    if name == _METADATA:
        raise UsageError(f"safetensors: {_METADATA} is reserved and cannot name a tensor.")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise UsageError(f"{name}: a dense CPU tensor is needed, got {tensor.layout} on {tensor.device}.")
    if tensor.dtype not in _NAMES_OF_DTYPES:
        raise UsageError(f"{name}: {tensor.dtype} has no name in safetensors.")
    if not _is_shape(tensor.shape):
        raise UsageError(f"{name}: shape {list(tensor.shape)} must be at most {MAX_DIMENSIONS} integers from 1 to 2**31-1.")


class TensorsOnDisk(Mapping[str, torch.Tensor]):
    """The tensors of a file by their names, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, _ = read_header(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self.path, self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
