"""The safetensors file: exchanged with the reference implementation in both directions."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitpress.checkpoints import durable
from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.safetensors_file import TORCH_DTYPES, TensorEntry, read_header, read_tensor, serialize
from bitpress.errors import CheckpointError, MemoryLimitError, UsageError


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits: NaN payloads and subnormals must survive as they are."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype is torch.bool else 256
    return torch.randint(0, limit, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(path, entry) for name, entry in read_header(path)[0].items()}


@pytest.fixture
def mixed() -> dict[str, torch.Tensor]:
    shapes: list[tuple[int, ...]] = [(), (1,), (3,), (3, 5), (2, 1, 7), (1, 1, 1, 1, 1)]
    return {
        f"model.{dtype}.{index}": random_tensor(torch_dtype, shape, seed=index)
        for dtype, torch_dtype in TORCH_DTYPES.items()
        for index, shape in enumerate(shapes)
    }


def test_the_reference_reads_what_is_written(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    num_bytes, _ = write_durably(path, serialize(mixed, {"format": "pt", "é": "ü\n"}))
    assert path.stat().st_size == num_bytes
    theirs = load_file(path)
    assert {name: bits(tensor) for name, tensor in theirs.items()} == {name: bits(t) for name, t in mixed.items()}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "é": "ü\n"}


def test_what_the_reference_writes_is_read(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    save_file(mixed, path, {"format": "pt"})
    entries, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {name: bits(t) for name, t in read_all(path).items()} == {name: bits(t) for name, t in mixed.items()}
    for name, entry in entries.items():
        assert (entry.name, entry.torch_dtype, entry.shape) == (name, mixed[name].dtype, tuple(mixed[name].shape))
        assert (entry.numel, entry.nbytes) == (mixed[name].numel(), mixed[name].nbytes)
    assert [entry.start for entry in entries.values()] == sorted(entry.start for entry in entries.values())


def test_one_dtype_gives_the_same_bytes_as_the_reference(tmp_path: Path) -> None:
    tensors = {name: random_tensor(torch.float32, (3, 2)) for name in ("z", "model.10", "model.9", "é", "A")}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert b"".join(serialize(tensors, {"format": "pt"})) == (tmp_path / "theirs").read_bytes()


def test_bytes_do_not_depend_on_the_order_of_the_mappings(mixed: dict[str, torch.Tensor]) -> None:
    backwards = dict(reversed(mixed.items()))
    assert b"".join(serialize(mixed, {"a": "1", "b": "2"})) == b"".join(serialize(backwards, {"b": "2", "a": "1"}))


def test_every_tensor_is_aligned(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    for metadata in ({}, {"k": "v"}, {"k": "vw"}, {"k": "vwx"}):
        path = tmp_path / "a.safetensors"
        write_durably(path, serialize(mixed, metadata))
        entries, read = read_header(path)
        assert read == metadata
        assert all(entry.start % entry.torch_dtype.itemsize == 0 for entry in entries.values())
        assert min(entry.start for entry in entries.values()) % 8 == 0


def test_memory_is_fresh_writable_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    # U8 before F64, as a careless writer does it: the file's own alignment is not relied on.
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F64", "shape": [2], "data_offsets": [3, 19]},
        }
    ).encode()
    values = torch.tensor([1.5, -2.0], dtype=torch.float64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xyz" + values.numpy().tobytes())
    before = path.read_bytes()
    read = read_all(path)["b"]
    assert torch.equal(read, values)
    assert read.data_ptr() % 8 == 0
    read.fill_(7.0)
    os.truncate(path, 0)
    assert read.tolist() == [7.0, 7.0]
    path.write_bytes(before)
    assert torch.equal(read_all(path)["b"], values)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8", "I64", "BOOL"])
def test_rows_are_the_slice_of_the_whole(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.safetensors"
    tensor = random_tensor(TORCH_DTYPES[dtype], (7, 3, 2))
    write_durably(path, serialize({"pad": random_tensor(torch.uint8, (5,)), "t": tensor}, None))
    entry = read_header(path)[0]["t"]
    for rows in (slice(None), slice(0, 7), slice(2, 5), slice(None, 1), slice(6, None), slice(3, 3), slice(7, 7, 1)):
        assert bits(read_tensor(path, entry, rows)) == bits(tensor[rows])


@pytest.mark.parametrize("rows", [slice(0, 8), slice(-1, None), slice(5, 4), slice(0, 4, 2), slice(8, 8)])
def test_rows_are_never_clamped(tmp_path: Path, rows: slice) -> None:
    path = tmp_path / "a.safetensors"
    write_durably(path, serialize({"t": torch.zeros(7, 2), "scalar": torch.zeros(())}, None))
    entries, _ = read_header(path)
    with pytest.raises(UsageError, match="contiguous range"):
        read_tensor(path, entries["t"], rows)
    with pytest.raises(UsageError, match="contiguous range"):
        read_tensor(path, entries["scalar"], slice(0, 0))


def test_reads_go_on_after_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call moves at most 0x7ffff000 bytes; here at most 7, so that the loop is tested without 2 GiB."""
    path = tmp_path / "a.safetensors"
    tensor = random_tensor(torch.int32, (13, 3))
    write_durably(path, serialize({"t": tensor}, None))
    real, calls = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, [buffer[:7] for buffer in buffers], offset)

    monkeypatch.setattr(durable.os, "preadv", short)
    assert bits(read_all(path)["t"]) == bits(tensor)
    assert len(calls) > 13 * 3 * 4 // 7


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_durably(path, serialize({"t": torch.ones(100)}, None))
    entry = read_header(path)[0]["t"]
    os.truncate(path, entry.end - 1)
    with pytest.raises(CheckpointError, match=f"ends at byte {entry.end}"):
        read_tensor(path, entry)


def test_an_entry_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_durably(path, serialize({"t": torch.ones(100)}, None))
    entry = read_header(path)[0]["t"]
    with pytest.raises(CheckpointError, match="do not match F32"):
        read_tensor(path, TensorEntry("t", "F32", (99,), entry.start, entry.end))


def test_memory_that_is_not_there_has_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    num_bytes = 2**32
    path.write_bytes(b"")
    os.truncate(path, num_bytes)  # sparse
    entry = TensorEntry("t", "U8", (2**16, 2**16), 0, num_bytes)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, hard))
    try:
        with pytest.raises(MemoryLimitError, match=f"no memory for {num_bytes} bytes"):
            read_tensor(path, entry)
        assert read_tensor(path, entry, slice(2**16 - 1, None)).sum() == 0  # a range needs its own bytes only
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_booleans_are_zero_or_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_durably(path, serialize({"t": torch.tensor([True, False, True])}, None))
    data = bytearray(path.read_bytes())
    data[-2] = 2
    path.write_bytes(data)
    entry = read_header(path)[0]["t"]
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        read_tensor(path, entry)
    assert read_tensor(path, entry, slice(0, 1)).tolist() == [True]


def test_views_are_written_as_they_look() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"t": base.t(), "s": base[::2, 1::2], "e": base[:1].expand(3, 6), "p": torch.nn.Parameter(base)}
    complexes = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    views |= {"c": complexes.conj(), "n": complexes.conj().imag, "m": torch._neg_view(base)}
    plain = {name: view.detach().clone().resolve_conj().resolve_neg().contiguous() for name, view in views.items()}
    assert b"".join(serialize(views, None)) == b"".join(serialize(plain, None))


def test_a_stream_holds_one_tensor_without_a_copy() -> None:
    tensor = torch.zeros(1000, dtype=torch.bfloat16)
    head, body = serialize({"t": tensor}, None)
    tensor.fill_(1.0)
    assert len(head) % 8 == 0
    assert bytes(body) == tensor.view(torch.uint8).numpy().tobytes()  # the view saw the change: no copy was made


@pytest.mark.parametrize(
    ("tensors", "metadata", "rule"),
    [
        ({"t": torch.zeros(0)}, {}, "shape"),
        ({"t": torch.zeros(3, 0, 2)}, {}, "shape"),
        ({"t": torch.zeros([1] * 17)}, {}, "shape"),
        ({"t": torch.zeros(2, device="meta")}, {}, "CPU tensor"),
        ({"t": torch.zeros(2).to_sparse()}, {}, "CPU tensor"),
        ({"t": torch.zeros(2, dtype=torch.complex128)}, {}, "no name"),
        ({"__metadata__": torch.zeros(2)}, {}, "cannot name a tensor"),
        ({"t": torch.zeros(2)}, {"a": 1}, "metadata"),
        ({"t": torch.zeros(2)}, {"a": "\ud800"}, "metadata"),
        ({"t": torch.zeros(2)}, {"a": "x" * 2**24}, "header"),
    ],
)
def test_what_the_format_does_not_hold_is_refused_before_the_first_byte(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], rule: str
) -> None:
    with pytest.raises(UsageError, match=rule):
        serialize(tensors, metadata)


@pytest.mark.parametrize("name", ["", "a" * 513, "a\0b", "a\nb", "a\x7f", "a\x85", "a\ud800"])
def test_names_that_the_reader_refuses_are_not_written(name: str) -> None:
    with pytest.raises(CheckpointError, match="tensor name"):
        serialize({name: torch.zeros(1)}, None)


def test_no_tensors_make_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_durably(path, serialize({}, {"format": "pt"}))
    assert read_header(path) == ({}, {"format": "pt"})
    assert load_file(path) == {}


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES))
)
def test_any_mapping_makes_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    tensors = {name: random_tensor(TORCH_DTYPES[dtype], shape) for name, (dtype, shape) in plan.items()}
    write_durably(path, serialize(tensors, None))
    want = {name: bits(tensor) for name, tensor in tensors.items()}
    assert {name: bits(tensor) for name, tensor in read_all(path).items()} == want
    assert {name: bits(tensor) for name, tensor in load_file(path).items()} == want


def test_one_element_of_any_stride_is_written(tmp_path: Path) -> None:
    value = torch.full((1, 1), 2.5).expand(1, 256).reshape(-1)[:1]
    assert value.stride(0) != 1
    write_durably(tmp_path / "one.safetensors", serialize({"a": value}, None))
    read = read_tensor(tmp_path / "one.safetensors", read_header(tmp_path / "one.safetensors")[0]["a"])
    assert read.tolist() == [2.5]
