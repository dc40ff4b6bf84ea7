"""JSON, strict for the files that bitpress writes and liberal for those of other tools; neither exhausts the reader.

Strict (`read_json`, `parse_json`): one meaning a file, whoever reads it. Refused: more than 16 MiB, bytes that are not UTF-8,
nesting deeper than 32, a repeated key, NaN and infinities (also as a number too large for a double), integers of more than 20
digits, lone surrogates. Writing is canonical: keys sorted, one space of indent, a newline at the end, so that equal values are
equal bytes.

Liberal (`read_foreign_json`, `parse_foreign_json`): whatever Python's own reader accepts, since that is what transformers writes and
reads with: NaN and infinities, integers of any length (10**30 is transformers' way to say "unknown"), a repeated key (the last
counts), lone surrogates; and a byte order mark, which some editors write. Refused: more than 64 MiB, bytes that are not UTF-8,
nesting deeper than 128.
"""

import codecs
import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.errors import CheckpointError

__all__ = [
    "MAX_FOREIGN_JSON_BYTES",
    "MAX_FOREIGN_JSON_DEPTH",
    "MAX_JSON_BYTES",
    "MAX_JSON_DEPTH",
    "parse_foreign_json",
    "parse_json",
    "read_foreign_json",
    "read_json",
    "read_json_bytes",
    "write_json_bytes",
]

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
MAX_FOREIGN_JSON_BYTES = 64 * 2**20
MAX_FOREIGN_JSON_DEPTH = 128  # far below where Python's reader, or a copy of what it gives, runs out of stack
_MAX_INTEGER_DIGITS = 20  # of 2**64
_MAX_EXACT_DIGITS = 4300  # Python turns longer texts into no integer, since that takes quadratic time

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, foreign_values: bool = False) -> Any:
    """Read and parse a regular file that bitpress wrote. Raises CheckpointError that names the broken rule."""
    return parse_json(read_json_bytes(path, max_bytes), str(path), max_bytes, foreign_values=foreign_values)


def read_foreign_json(path: Path) -> Any:
    """Read and parse a regular file that another tool wrote. Raises CheckpointError with the reason."""
    return parse_foreign_json(read_json_bytes(path, MAX_FOREIGN_JSON_BYTES), str(path))


def parse_json(data: bytes, where: str, max_bytes: int = MAX_JSON_BYTES, *, foreign_values: bool = False) -> Any:
    """Parse strict JSON; `where` begins every message. The integer `-0` is read as -0.0, since it cannot be a count or an offset.

    `foreign_values` allows for what bitpress copies out of a file of another tool: long integers, half surrogate pairs, deep nesting.
    """
    _check_size(len(data), where, max_bytes)
    _check_depth(data, where, MAX_FOREIGN_JSON_DEPTH if foreign_values else MAX_JSON_DEPTH)
    most_digits = _MAX_EXACT_DIGITS if foreign_values else _MAX_INTEGER_DIGITS

    def fail(text: str) -> NoReturn:
        raise CheckpointError(f"{where}: {text}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            fail(f"the key {twice[:80]!r} is given twice in one object.")
        return value

    def integer(text: str) -> int | float:
        if len(text.lstrip("-")) > most_digits:
            fail(f"an integer has {len(text.lstrip('-'))} digits; the limit is {most_digits}.")
        return -0.0 if text == "-0" else int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            fail(f"the number {text[:40]} is too large for a double.")
        return value

    def constant(text: str) -> NoReturn:
        fail(f"{text} is not JSON; numbers must be finite.")

    with _reader_errors(where):
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_float=real, parse_constant=constant)
        if not foreign_values and _SURROGATE_ESCAPE.search(data):  # half a pair has no UTF-8, and other readers refuse it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_foreign_json(data: bytes, where: str) -> Any:
    """Parse JSON as Python writes it; `where` begins every message."""
    _check_size(len(data), where, MAX_FOREIGN_JSON_BYTES)
    data = data.removeprefix(codecs.BOM_UTF8)
    _check_depth(data, where, MAX_FOREIGN_JSON_DEPTH)

    def integer(text: str) -> int | float:
        return int(text) if len(text) <= _MAX_EXACT_DIGITS else float(text)

    with _reader_errors(where):
        return json.loads(data.decode("utf-8"), parse_int=integer)


def write_json_bytes(value: Any) -> bytes:
    """Return the canonical UTF-8 bytes of a JSON value. Raises ValueError or TypeError for any other value."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_json_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most so many bytes. Raises CheckpointError."""
    with open_regular(path) as (descriptor, num_bytes):
        _check_size(num_bytes, str(path), max_bytes)  # before the allocation
        data = bytearray(num_bytes)
        read_into(path, descriptor, memoryview(data), 0)
    return bytes(data)


@contextlib.contextmanager
def _reader_errors(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 at byte {error.start}.") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a string holds half of a surrogate pair.") from error
    except json.JSONDecodeError as error:
        message = f"{where}: is not JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        raise CheckpointError(message) from error


def _check_size(num_bytes: int, where: str, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise CheckpointError(f"{where}: the JSON has {num_bytes} bytes; at most {max_bytes} are read.")


def _check_depth(data: bytes, where: str, deepest: int) -> None:
    """Refuse deep nesting before the parser recurses, in time linear in the bytes.

    Escapes are removed first, then quoted strings, then everything but brackets. The parser stops at an escape outside
    a string and at a bracket that closes nothing, so neither can hide a depth.
    """
    depth = 0
    outside = _STRING.sub(b"", _ESCAPE.sub(b"", data) if b"\\" in data else data)
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > deepest:
            raise CheckpointError(f"{where}: the JSON is nested deeper than {deepest} levels, the limit.")
