"""The front matter of a model card, which hubs read: its keys are copied from the source where the source has them.

base_model   the hub's name of the source: of a named model, of a hub's cache, of `_name_or_path` in config.json; else what the source's
             own card says
license, license_name, license_link, language, datasets      from the source's own card; the licence of a named model from its table

Keys that the source does not have are left out; a source's card that cannot be read counts as empty.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bitpress.checkpoints.jsonfile import read_json
from bitpress.checkpoints.named import find_origin
from bitpress.errors import BitpressError

__all__ = ["front_matter", "write_front_matter"]

TAKEN = ("license", "license_name", "license_link", "language", "datasets")
MOST_BYTES = 2**20
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


def front_matter(model: Path, weights: str) -> dict[str, Any]:
    """Return the keys of the front matter for a model that was made from the directory `model`."""
    own = _read_card(model / "README.md")
    named = find_origin(model)
    base = named.hub if named is not None else _of_cache(model) or _of_config(model) or _words(own.get("base_model"))
    taken = {key: _words(own.get(key)) for key in TAKEN}
    if named is not None:
        taken["license"] = named.licence.lower()
    known = {"base_model": base, "base_model_relation": "quantized" if base else None, **taken}
    return {
        "library_name": "bitpress",
        "pipeline_tag": "text-generation",
        **{key: value for key, value in known.items() if value},
        "tags": ["quantized", "bitpress", weights],
    }


def write_front_matter(keys: Mapping[str, Any]) -> str:
    """Return the keys as YAML between two lines `---`."""
    return f"---\n{yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True)}---"


def _read_card(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        keys = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _words(value: Any) -> str | list[str] | None:
    """Return a text or a list of texts; YAML reads the language `no` as false."""
    if value is False:
        return "no"
    if isinstance(value, str):
        return value if 0 < len(value) <= 500 else None
    if isinstance(value, list) and len(value) <= 1000:
        return [word for word in map(_words, value) if isinstance(word, str)] or None
    return None


def _of_cache(model: Path) -> str | None:
    found = _HUB_CACHE.search(str(model.absolute()))
    return f"{found[1]}/{found[2]}" if found else None


def _of_config(model: Path) -> str | None:
    try:
        config = read_json(model / "config.json")
    except BitpressError:
        return None
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists() else None
