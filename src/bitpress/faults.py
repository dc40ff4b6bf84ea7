"""Errors of pydantic and YAML in one plain line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitpress.errors import UsageError, nearest, shown

__all__ = ["parse_yaml", "read_yaml", "value_fault"]

# Pydantic's kinds of errors, and the requirement that each violates. Pydantic's own sentences are never shown.
_NEEDED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda c: "it is missing",
    "extra_forbidden": lambda c: "there is no such key",
    "invalid_key": lambda c: "keys are texts",
    "string_type": lambda c: "a text is needed",
    "int_type": lambda c: "a whole number is needed",
    "int_parsing": lambda c: "a whole number is needed",
    "int_from_float": lambda c: "a whole number is needed",
    "int_parsing_size": lambda c: "a smaller number is needed",
    "float_type": lambda c: "a number is needed",
    "float_parsing": lambda c: "a number is needed",
    "finite_number": lambda c: "a finite number is needed",
    "bool_type": lambda c: "true or false is needed",
    "bool_parsing": lambda c: "true or false is needed",
    "greater_than": lambda c: f"a number above {c['gt']} is needed",
    "greater_than_equal": lambda c: f"{c['ge']} or more is needed",
    "less_than": lambda c: f"a number below {c['lt']} is needed",
    "less_than_equal": lambda c: f"{c['le']} or less is needed",
    "tuple_type": lambda c: "a list is needed",
    "too_short": lambda c: f"a list of {c['min_length']} or more is needed",
    "list_type": lambda c: "a list is needed",
    "dict_type": lambda c: "a mapping of keys to values is needed",
    "mapping_type": lambda c: "a mapping of keys to values is needed",
    "model_type": lambda c: "a mapping of keys to values is needed",
    "model_attributes_type": lambda c: "a mapping of keys to values is needed",
    "dataclass_type": lambda c: "a mapping of keys to values is needed",
}

_UNION = ("int", "float", "str", "bool", "none")


def value_fault(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Return the path of the first error by keys from the outside, and the error: "0 is there, 1 or more is needed"."""
    faults = error.errors(include_url=False)
    first = faults[0]
    kind, context = first["type"], first.get("ctx", {})
    # The members of a union, such as int and literal['row','group'], appear in the path as if they were keys.
    at = tuple(part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _UNION))
    if kind == "value_error":  # raised by our own class, in one line
        return at, _ended(str(context["error"]))
    if any(fault["type"] == "literal_error" for fault in faults if fault["loc"][: len(at)] == at):
        return at, _none_of(first["input"], [f for f in faults if f["type"] == "literal_error"])
    needed = _NEEDED[kind](context) if kind in _NEEDED else "another value is needed"
    got = "" if kind == "missing" else f" (got {shown(first['input'])})"
    return at, _ended(needed + got)


def _ended(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _none_of(got: Any, faults: list[Any]) -> str:
    expected = str(faults[0]["ctx"]["expected"])  # "'auto', 'bf16' or 'fp32'"
    names = [part.strip("' ") for part in expected.replace(" or ", ", ").split(",")]
    near = nearest(got, names) if isinstance(got, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{shown(got)} is not {'one of ' if len(names) > 2 else ''}{' or '.join((', '.join(names[:-1]), names[-1]))}.{hint}"


class _Unique(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(where: str, text: str) -> Any:
    """Read YAML. Raises UsageError with the position and the reason."""
    try:
        return yaml.load(text, _Unique)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2026-13-01 is a ValueError
        raise UsageError(f"{where}: is not YAML: {_yaml_fault(error)}.") from error


def read_yaml(path: Path, expected: str) -> Any:
    """Read a YAML file. Raises UsageError; `expected` describes the file in the error if it is missing."""
    try:
        return parse_yaml(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not YAML: it is not text in UTF-8.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}; {expected}.") from error


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).splitlines()[0].removesuffix(".")
    mark = error.problem_mark or error.context_mark
    at = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{' '.join(str(error.problem or error.context).split())}{at}"
