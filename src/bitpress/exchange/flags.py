"""Yes or no in the configuration of another tool: true and false of JSON, and nothing that Python takes for one of them."""

from collections.abc import Mapping
from typing import Any

from bitpress.errors import FormatError

__all__ = ["read_flag"]


def read_flag(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a setting; `default` where it is absent or null. Raises FormatError for anything but true and false, "false" in quotes too."""
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(f"{name} is {str(value)[:60]!r} where true or false is needed.")
    return value
