"""Hostile safetensors files: one made by hand for each rule, then mutations of a valid one.

Whatever is accepted must be accepted by the reference reader too, with equal names, dtypes, shapes and bytes.
"""

import json
import os
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bitpress.checkpoints.safetensors_file import TORCH_DTYPES, read_header, read_tensor, serialize
from bitpress.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
Content = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]


def file_bytes(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def content(name: str, tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), raw


def read_ours(path: Path) -> Content:
    entries, _ = read_header(path)
    return {name: content(name, read_tensor(path, entry)) for name, entry in entries.items()}


def read_theirs(path: Path) -> Content:
    with safe_open(path, "pt") as file:
        return {name: content(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "fewer than the 10"),
    "length cut short": (b"\x08\0\0\0\0\0\0", "fewer than the 10"),
    "length only": (bytes(8), "begin with"),
    "length of zero": (bytes(8) + b"{}", "begin with"),
    "header longer than the file": (struct.pack("<Q", 3) + b"{}", "claims 3 bytes"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", "claims"),
    "header of 2**64-1 bytes": (b"\xff" * 8 + b"{}", "claims 18446744073709551615"),
    "header of 17 MiB": (file_bytes(b"{}" + b" " * (17 * 2**20)), "at most 16777216"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "claims"),
    "space before the header": (file_bytes(b" " + json.dumps({"t": F32}).encode()), "begin with"),
    "list for a header": (file_bytes([F32]), "begin with"),
    "header not JSON": (file_bytes(b"{'t': 1}"), "not JSON"),
    "header not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "header padded with NUL": (file_bytes(json.dumps({"t": F32}).encode() + bytes(4)), "not JSON"),
    "header nested": (file_bytes(b'{"t":' + b"[" * 100_000), "nested deeper"),
    "name twice": (file_bytes(b'{"t":%b,"t":%b}' % ((json.dumps(F32).encode(),) * 2)), "given twice"),
    "dtype twice": (
        file_bytes(b'{"t":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "given twice",
    ),
    "half a surrogate": (file_bytes(b'{"\\ud800":%b}' % json.dumps(F32).encode()), "surrogate"),
    "metadata not an object": (file_bytes({"__metadata__": [], "t": F32}), "__metadata__"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}, "t": F32}), "__metadata__"),
    "metadata nested": (file_bytes({"__metadata__": {"a": {}}, "t": F32}), "__metadata__"),
    "name empty": (file_bytes({"": F32}), "tensor name"),
    "name too long": (file_bytes({"n" * 513: F32}), "a tensor name has 513"),
    "name with NUL": (file_bytes({"a\0b": F32}), "control characters"),
    "name with a newline": (file_bytes({"a\nb": F32}), "control characters"),
    "name with an escape sequence": (file_bytes({"\x1b[2J": F32}), "control characters"),
    "entry not an object": (file_bytes({"t": [1]}), "exactly dtype"),
    "entry with a further key": (file_bytes({"t": {**F32, "stride": [1]}}), "exactly dtype"),
    "entry without dtype": (file_bytes({"t": {"shape": [2], "data_offsets": [0, 8]}}), "exactly dtype"),
    "dtype unknown": (file_bytes({"t": {**F32, "dtype": "F31"}}), "is unknown"),
    "dtype in lower case": (file_bytes({"t": {**F32, "dtype": "f32"}}), "is unknown"),
    "dtype not a string": (file_bytes({"t": {**F32, "dtype": ["F32"]}}), "is unknown"),
    "shape not a list": (file_bytes({"t": {**F32, "shape": 2}}), "shape must"),
    "dimension of a fraction": (file_bytes({"t": {**F32, "shape": [2.0]}}), "shape must"),
    "dimension of a boolean": (file_bytes({"t": {**F32, "shape": [2, True]}}), "shape must"),
    "dimension negative": (file_bytes({"t": {**F32, "shape": [-1, -2]}}), "shape must"),
    "dimension zero": (file_bytes({"t": {**F32, "shape": [0], "data_offsets": [0, 0]}}, b""), "shape must"),
    "dimension of 2**31": (file_bytes({"t": {**F32, "dtype": "U8", "shape": [2**31]}}), "shape must"),
    "17 dimensions": (file_bytes({"t": {**F32, "shape": [2] + [1] * 16}}), "shape must"),
    "product that wraps to 8 bytes in 64 bits": (
        file_bytes({"t": {**F32, "dtype": "U8", "shape": [1209262697, 882635848, 42719783, 71]}}),
        "needs 3237349628209610708169523208",  # = 8 modulo 2**64
    ),
    "integer of 30 digits": (file_bytes({"t": {**F32, "shape": [10**29]}}), "30 digits"),
    "offsets of one": (file_bytes({"t": {**F32, "data_offsets": [8]}}), "data_offsets must"),
    "offsets of three": (file_bytes({"t": {**F32, "data_offsets": [0, 4, 8]}}), "data_offsets must"),
    "offsets of booleans": (file_bytes({"t": {**F32, "data_offsets": [False, 8]}}), "data_offsets must"),
    "offset minus zero": (
        file_bytes(json.dumps({"t": F32}).replace("[0, 8]", "[-0, 8]").encode()),
        "data_offsets must",
    ),
    "offsets negative": (file_bytes({"t": {**F32, "data_offsets": [-8, 0]}}), "data_offsets must"),
    "offsets beyond 63 bits": (file_bytes({"t": {**F32, "data_offsets": [2**64, 2**64 + 8]}}), "data_offsets must"),
    "offsets swapped": (file_bytes({"t": {**F32, "data_offsets": [8, 0]}}), "needs 8"),
    "too few bytes for the shape": (file_bytes({"t": {**F32, "data_offsets": [0, 7]}}, bytes(7)), "needs 8"),
    "too many bytes for the shape": (file_bytes({"t": {**F32, "data_offsets": [0, 9]}}, bytes(9)), "needs 8"),
    "region past the end": (file_bytes({"t": F32}, bytes(7)), "cut short or has a tail"),
    "tail": (file_bytes({"t": F32}, bytes(9)), "cut short or has a tail"),
    "data of nobody": (file_bytes({}, bytes(1)), "cut short or has a tail"),
    "gap at the front": (file_bytes({"t": {**F32, "data_offsets": [1, 9]}}, bytes(9)), "leave a gap"),
    "gap between": (file_bytes({"a": F32, "b": {**F32, "data_offsets": [9, 17]}}, bytes(17)), "leave a gap"),
    "the same region twice": (file_bytes({"a": F32, "b": F32}, bytes(16)), "overlap"),
    "regions that overlap": (file_bytes({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "overlap"),
}


@pytest.mark.parametrize("rule", HOSTILE)
def test_every_rule_refuses_its_file(tmp_path: Path, rule: str) -> None:
    data, message = HOSTILE[rule]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert re.search(r"[\x00-\x1f\x7f]", str(caught.value)) is None  # nothing of the file reaches the terminal raw


def test_the_pattern_of_the_hostile_files_is_valid(tmp_path: Path) -> None:
    """The files above differ from this one in one respect only: it must be accepted."""
    path = tmp_path / "a.safetensors"
    for header, size in (
        ({"t": F32}, 8),
        ({"__metadata__": {"a": "1"}, "t": F32}, 8),
        ({"__metadata__": None, "t": F32}, 8),
        ({}, 0),
    ):
        path.write_bytes(file_bytes(header, bytes(size)))
        assert read_ours(path) == read_theirs(path)
    path.write_bytes(file_bytes({"b": {**F32, "data_offsets": [8, 16]}, "a": F32}, bytes(range(16))))
    assert read_ours(path) == read_theirs(path)
    assert list(read_header(path)[0]) == ["a", "b"]


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=r"regular file|cannot be opened"):
            read_header(path)


def test_a_sparse_giant_is_refused_without_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{")
    os.truncate(path, 2**41)
    with pytest.raises(CheckpointError, match="at most 16777216"):
        read_header(path)


def valid_file() -> bytes:
    tensors = {
        "model.embed": torch.arange(12, dtype=torch.float32).reshape(4, 3),
        "model.norm": torch.arange(5, dtype=torch.bfloat16),
        "model.codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "model.flags": torch.tensor([True, False]),
        "model.step": torch.tensor(7, dtype=torch.int64),
    }
    return b"".join(serialize(tensors, {"format": "pt"}))


def flip_bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)


def flip_header_byte(rng: random.Random, data: bytearray) -> None:
    end = 8 + int.from_bytes(data[:8], "little")
    data[rng.randrange(8, end)] = rng.choice(b'0123456789-+.eE[]{}":,\\ \0tfnu\xff\xc3F')


def change_length(rng: random.Random, data: bytearray) -> None:
    length = int.from_bytes(data[:8], "little")
    data[:8] = (rng.choice([0, 1, 2, length - 1, length + 1, length ^ (1 << rng.randrange(64)), 2**64 - 1])).to_bytes(
        8, "little"
    )


def resize(rng: random.Random, data: bytearray) -> None:
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    else:
        data += rng.randbytes(rng.choice([1, 4, 8, 100]))


def cut_or_repeat(rng: random.Random, data: bytearray) -> None:
    first = rng.randrange(len(data))
    stop = min(len(data), first + rng.choice([1, 2, 8, 40]))
    data[first:stop] = rng.choice([b"", bytes(data[first:stop]) * 2])


def change_number(rng: random.Random, header: dict[str, Any]) -> None:
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    numbers = entry[rng.choice(["shape", "data_offsets"])]
    hostile = [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**25, 1.0, True, None, "1", [1], -0.0, 1e300]
    if numbers:
        index = rng.randrange(len(numbers))
        old = numbers[index]
        numbers[index] = rng.choice([*hostile, old + 1, old - 1, old * 2])
    else:
        numbers.append(rng.choice([1, 2]))


def change_entry(rng: random.Random, header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    action = rng.randrange(9)
    if action == 0:
        header[name]["dtype"] = rng.choice([*TORCH_DTYPES, "F4", "Q4", "", None, 3])
    elif action == 1:
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )
    elif action == 2:
        header[name]["shape"] = list(reversed(header[name]["shape"]))
    elif action == 3:
        header[name]["shape"] = [1, *header[name]["shape"]]
    elif action == 4:
        header[rng.choice(["", "\0", "new", "n" * 600, "__metadata__", "\u202e"])] = header.pop(name)
    elif action == 5:
        header["new"] = dict(header[name])
    elif action == 6:
        del header[name]
    elif action == 7:
        del header[name][rng.choice(["dtype", "shape", "data_offsets"])]
    else:
        header[name][rng.choice(["extra", "stride", "Dtype"])] = 1


def change_metadata(rng: random.Random, header: dict[str, Any]) -> None:
    header["__metadata__"] = rng.choice(
        [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"\0": "\0"}, {"format": "x"}]
    )


def change_structure(rng: random.Random, data: bytearray) -> None:
    """Change the header as a value, and write it back with a right length: such a file gets past the first checks."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(bytes(data[8 : 8 + length])), bytes(data[8 + length :])
    rng.choice([change_number, change_number, change_entry, change_metadata])(rng, header)
    if rng.random() < 0.2:
        change_metadata(rng, header)
    if rng.random() < 0.3:
        items = list(header.items())
        rng.shuffle(items)
        header = dict(items)
    text = json.dumps(header).encode() + b" " * rng.randrange(3)
    if rng.random() < 0.2:
        body = body[: -rng.randrange(1, 9)] if rng.random() < 0.5 else body + bytes(rng.randrange(1, 9))
    data[:] = struct.pack("<Q", len(text)) + text + body


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip_bytes,
    flip_header_byte,
    flip_header_byte,
    change_length,
    resize,
    cut_or_repeat,
    change_structure,
    change_structure,
    change_structure,
    change_structure,
)


def test_mutations_are_refused_or_mean_what_the_reference_reads(tmp_path: Path) -> None:
    """4,000 mutations: no crash, no error but CheckpointError, no hang, no reading of our own invention."""
    rng = random.Random(20240607)
    original = valid_file()
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(original)
    want = {name: value[:2] for name, value in read_ours(path).items()}
    accepted = unchanged = refused = 0
    slowest = 0.0
    for number in range(4000):
        data = bytearray(original)
        rng.choice(MUTATIONS)(rng, data)
        path.write_bytes(data)
        started = time.process_time()
        try:
            ours = read_ours(path)
        except CheckpointError:
            refused += 1
        else:
            accepted += 1
            unchanged += {name: value[:2] for name, value in ours.items()} == want
            assert ours == read_theirs(path), f"mutation {number}: {bytes(data)!r}"
        slowest = max(slowest, time.process_time() - started)
    print(f"accepted {accepted} ({unchanged} of them with the original's names and shapes), refused {refused}, {slowest:.3f} s")
    assert accepted > 300  # else the mutations are too coarse to test the reader's depths
    assert refused > 2000
    assert slowest < 5.0
