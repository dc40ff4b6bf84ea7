"""Strict JSON: one meaning a file, whoever reads it, and no file that exhausts the reader.

Refused: more than 16 MiB, bytes that are not UTF-8, nesting deeper than 32, a key given twice, NaN and infinities (also
as a number too large for a double), integers of more than 20 digits, lone surrogates. What is written is canonical:
keys sorted, one space of indent, a newline at the end, so that equal values are equal bytes.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.errors import CheckpointError

__all__ = ["MAX_JSON_BYTES", "MAX_JSON_DEPTH", "parse_json", "read_json", "write_json_bytes"]

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
_MAX_INTEGER_DIGITS = 20  # of 2**64

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read and parse a regular file; CheckpointError says which rule it breaks."""
    with open_regular(path) as (descriptor, num_bytes):
        _check_size(num_bytes, str(path), max_bytes)  # before the allocation
        data = bytearray(num_bytes)
        read_into(path, descriptor, memoryview(data), 0)
    return parse_json(bytes(data), str(path), max_bytes)


def parse_json(data: bytes, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse strict JSON; `where` begins every message. The integer `-0` is read as -0.0: it is no count or offset."""
    _check_size(len(data), where, max_bytes)
    _check_depth(data, where)

    def fail(text: str) -> NoReturn:
        raise CheckpointError(f"{where}: {text}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            fail(f"the key {twice[:80]!r} is given twice in one object.")
        return value

    def integer(text: str) -> int | float:
        if len(text.lstrip("-")) > _MAX_INTEGER_DIGITS:
            fail(f"an integer of {len(text.lstrip('-'))} digits; at most {_MAX_INTEGER_DIGITS} are read.")
        return -0.0 if text == "-0" else int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            fail(f"the number {text[:40]} is too large for a double.")
        return value

    def constant(text: str) -> NoReturn:
        fail(f"{text} is not JSON; numbers must be finite.")

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_float=real, parse_constant=constant)
        if _SURROGATE_ESCAPE.search(data):  # half a pair has no UTF-8, and other readers refuse it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 at byte {error.start}.") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a string holds half of a surrogate pair.") from error
    except json.JSONDecodeError as error:
        message = f"{where}: is not JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        raise CheckpointError(message) from error
    return value


def write_json_bytes(value: Any) -> bytes:
    """Return the canonical UTF-8 bytes of a JSON value; ValueError or TypeError for what is none."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _check_size(num_bytes: int, where: str, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise CheckpointError(f"{where}: JSON of {num_bytes} bytes; at most {max_bytes} are read.")


def _check_depth(data: bytes, where: str) -> None:
    """Refuse deep nesting before the parser recurses, in time linear in the bytes.

    Escapes go first, then whatever stands between quotes, then all but brackets. The parser stops at an escape outside
    a string and at a bracket that closes nothing, so that neither can hide a depth from it.
    """
    depth = 0
    outside = _STRING.sub(b"", _ESCAPE.sub(b"", data) if b"\\" in data else data)
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise CheckpointError(f"{where}: JSON nested deeper than {MAX_JSON_DEPTH}.")
