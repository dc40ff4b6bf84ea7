"""The header of a GGUF file, read and checked before anything trusts it.

byte 0      "GGUF", version (2 or 3), number of tensors, number of metadata pairs       u32 u32 u64 u64, little endian
metadata    key, type, value                             a string is u64 length + UTF-8, an array u32 type + u64 count
tensors     name, dimensions (fastest first), type, offset of the data
data        from the next multiple of general.alignment (32) on; every tensor lies inside the file
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.checkpoints.given import Given
from bitpress.errors import CheckpointError

__all__ = ["GgufHeader", "GgufTensor", "describe_given", "read_gguf_header"]

MAX_COUNT = 2**20  # of tensors and of metadata pairs
MAX_DIMENSIONS = 4
_HEADER_STEP = 2**24
_MAX_HEADER = 2**28
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """How a tensor is stored: dimensions, the fastest first, ggml's number of its type, and its place behind `data_start`."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The metadata without its arrays (those give their length), and how every tensor is stored.

    spans       metadata key -> first byte of the pair in the file, and the byte behind it
    data_start  where the data begin
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    spans: Mapping[str, tuple[int, int]]
    data_start: int
    num_bytes: int

    @property
    def alignment(self) -> int:
        return int(self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))


def describe_given(headers: Sequence[GgufHeader]) -> Given:
    """Describe the converted file, or its parts, for the report."""
    from gguf import GGMLQuantizationType, LlamaFileType

    types: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors.values():
            name = GGMLQuantizationType(tensor.kind).name
            types[name] = types.get(name, 0) + tensor.nbytes
    types = dict(sorted(types.items(), key=lambda item: (-item[1], item[0])))
    stated = headers[0].metadata.get("general.file_type")
    known = {int(kind): kind.name.partition("_")[2] for kind in LlamaFileType if kind is not LlamaFileType.GUESSED}
    file_type = known.get(stated) if type(stated) is int else None
    return Given("GGUF", file_type or next(iter(types)), sum(header.num_bytes for header in headers), len(headers), types)


class _Cursor:
    """Reads numbers and strings one after the other; the file's end and absurd lengths are CheckpointErrors."""

    def __init__(self, path: Path, descriptor: int, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self.at = 0
        self._descriptor = descriptor
        self._data = bytearray()

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def take(self, length: int) -> bytes:
        stop = self.at + length
        if stop > self.num_bytes:
            raise self.fail(f"is cut short: the header needs byte {stop}, the file has {self.num_bytes}; copy it again.")
        if stop > _MAX_HEADER:
            raise self.fail(f"the header is larger than {_MAX_HEADER} bytes, the limit.")
        if stop > len(self._data):
            start = len(self._data)
            part = bytearray(min(max(stop - start, _HEADER_STEP), self.num_bytes - start))
            read_into(self.path, self._descriptor, memoryview(part), start)
            self._data += part
        start, self.at = self.at, stop
        return bytes(self._data[start:stop])

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"the string before byte {self.at} of the header is not UTF-8.") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self._skip_array()
        return self._scalar(kind)

    def _scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.fail(f"unknown metadata type {kind} before byte {self.at}.")
        return self.number(_SCALARS[kind])

    def _skip_array(self) -> int:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING and count <= self.num_bytes // 8:
            for _ in range(count):
                self.string()
        else:
            raise self.fail(f"the metadata has an array of type {kind} with {count} entries, which is not supported.")
        return int(count)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check all of a file but its values. Raises CheckpointError."""
    with open_regular(path) as (descriptor, num_bytes):
        cursor = _Cursor(path, descriptor, num_bytes)
        if num_bytes < 24 or cursor.take(4) != b"GGUF":
            raise cursor.fail("is not a GGUF file: it does not begin with the letters GGUF and a header.")
        version = cursor.number("I")
        if version not in (2, 3):
            raise cursor.fail(f"unsupported GGUF version {version}; versions 2 and 3, little-endian, are supported.")
        num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
        if num_tensors > MAX_COUNT or num_pairs > MAX_COUNT:
            raise cursor.fail(
                f"the header claims {num_tensors} tensors and {num_pairs} metadata pairs; the limit is {MAX_COUNT} each."
            )
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(num_pairs):
            start = cursor.at
            key = cursor.string()
            if key in metadata:
                raise cursor.fail(f"the metadata key {key[:80]!r} is given twice.")
            metadata[key] = cursor.value()
            spans[key] = (start, cursor.at)
        if not num_tensors and metadata.get("split.count", 0) in (0, 1):  # a part may hold metadata alone
            raise cursor.fail("holds no tensors.")
        tensors, data_start = _read_tensors(cursor, num_tensors, metadata)
        return GgufHeader(metadata, tensors, spans, data_start, num_bytes)


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]) -> tuple[dict[str, GgufTensor], int]:
    from gguf import GGML_QUANT_SIZES

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment % 8:
        raise cursor.fail(f"general.alignment is {str(alignment)[:40]!r}; a multiple of 8 is needed.")
    sizes = {int(kind): pair for kind, pair in GGML_QUANT_SIZES.items()}
    tensors: dict[str, GgufTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        dimensions = cursor.number("I")
        shape = [cursor.number("Q") for _ in range(dimensions)] if dimensions <= MAX_DIMENSIONS else []
        kind, offset = cursor.number("I"), cursor.number("Q")
        if name in tensors or not shape or min(shape) < 1 or kind not in sizes:
            raise cursor.fail(f"tensor {name[:80]!r}: is given twice, has no shape, or has the unknown type {kind}.")
        block, block_bytes = sizes[kind]
        if shape[0] % block or offset % alignment:
            raise cursor.fail(f"tensor {name[:80]!r}: rows of {shape[0]} at offset {offset} do not fit blocks of {block}.")
        tensors[name] = GgufTensor(tuple(shape), kind, offset, math.prod(shape) // block * block_bytes)
    data_start = -(-cursor.at // alignment) * alignment
    end, name = max(((tensor.offset + tensor.nbytes, name) for name, tensor in tensors.items()), default=(0, ""))
    if tensors and data_start + end > cursor.num_bytes:
        raise cursor.fail(
            f"is cut short: {name[:80]!r} ends at byte {data_start + end}, the file has {cursor.num_bytes}; copy it again."
        )
    return tensors, data_start
