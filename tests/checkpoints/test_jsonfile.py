"""Strict JSON: every rule has a text that breaks only that rule."""

import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.checkpoints.jsonfile import MAX_JSON_BYTES, MAX_JSON_DEPTH, parse_json, read_json, write_json_bytes
from bitpress.errors import CheckpointError

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'"tab\there"', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"01", "not JSON"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        (b'[{"x": {"a": 1, "\\u0061": 2}}]', "'a' is given twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"1e400", "too large"),
        (b"-1e400", "too large"),
        (b"1" * 21, "21 digits"),
        (b"-" + b"9" * 5000, "5000 digits"),
    ],
)
def test_each_rule_refuses(data: bytes, rule: str) -> None:
    with pytest.raises(CheckpointError, match=rule) as caught:
        parse_json(data, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")


def test_values_at_the_limits_are_read() -> None:
    assert parse_json(b"9" * 20, "x") == 10**20 - 1
    assert parse_json(b"-" + b"9" * 20, "x") == 1 - 10**20
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert parse_json(b"1.7976931348623157e308", "x") == 1.7976931348623157e308


def test_minus_zero_is_no_integer() -> None:
    value = parse_json(b"-0", "x")
    assert type(value) is float
    assert math.copysign(1.0, value) == -1.0


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_counted_exactly(opening: bytes, closing: bytes) -> None:
    parse_json(opening * MAX_JSON_DEPTH + b"1" + closing * MAX_JSON_DEPTH, "x")
    with pytest.raises(CheckpointError, match="deeper than 32"):
        parse_json(opening * (MAX_JSON_DEPTH + 1) + b"1" + closing * (MAX_JSON_DEPTH + 1), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'["\\\\",' + b"[" * 1000,  # a string that ends with an escaped backslash
        b'["\\"",' + b"[" * 1000,  # a string that holds an escaped quote
    ],
)
def test_depth_is_refused_before_the_parser_recurses(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="deeper than 32"):
        parse_json(data, "x")


@pytest.mark.parametrize("text", ["[" * 100, '"' + "{" * 100, "\\" + "[" * 100, '\\"' + "[" * 100])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    assert parse_json(write_json_bytes({text: [text]}), "x") == {text: [text]}


@pytest.mark.parametrize("data", [b"]" * 100_000 + b"[" * 100_000, b"\\[" * 100_000, b'"' + b"[" * 100_000, b"\\"])
def test_brackets_that_hide_from_the_count_stop_the_parser(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        parse_json(data, "x")


@pytest.mark.parametrize("unit", [b'"', b'\\"', b"[]", b"\\", b'"\\', b"[", b"1", b'{"a":1},'])
def test_the_worst_four_mebibytes_take_linear_time(unit: bytes) -> None:
    data = unit * (2**22 // len(unit))
    started = time.process_time()
    with pytest.raises(CheckpointError):
        parse_json(data, "x")
    assert time.process_time() - started < 5.0  # a quadratic scan takes hours


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"{MAX_JSON_BYTES + 1} bytes"):
        read_json(path)
    os.truncate(path, 2**40)  # sparse: a buffer of this size would be a MemoryError
    with pytest.raises(CheckpointError, match=f"{2**40} bytes"):
        read_json(path)
    path.write_bytes(b"[1]      ")
    assert read_json(path, max_bytes=9) == [1]
    with pytest.raises(CheckpointError, match="9 bytes; at most 8"):
        read_json(path, max_bytes=8)
    with pytest.raises(CheckpointError, match="9 bytes; at most 8"):
        parse_json(b"[1]      ", "x", 8)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "missing.json", ".", "nul\0.json"):
        with pytest.raises(CheckpointError, match=r"regular file|cannot be opened"):
            read_json(tmp_path / name)


def test_written_bytes_are_canonical() -> None:
    assert write_json_bytes({"b": [1, "é"], "a": {}}) == '{\n "a": {},\n "b": [\n  1,\n  "é"\n ]\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_bytes({"a": math.nan})


@settings(derandomize=True, max_examples=200, deadline=None)
@given(JSON_VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    data = write_json_bytes(value)
    assert parse_json(data, "x") == value
    assert write_json_bytes(parse_json(data, "x")) == data
