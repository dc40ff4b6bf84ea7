"""Cached layouts: the second time a model is opened, its weights are mapped from a file as the engine reads them.

A model is laid out once (`runtime.native.assemble`), which needs torch and takes seconds. The result goes into the user's cache folder
under the SHA-256 of the model's manifest (which holds that of every file), the head's format and the layout's version. It also holds
the tokenizer as `tokenizers` writes it, the chat template and the sampling settings, which text needs. Nothing here imports torch.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bitpress.checkpoints.jsonfile import parse_json
from bitpress.checkpoints.manifest import MANIFEST_NAME
from bitpress.checkpoints.mapped_tree import read_prepared, write_prepared
from bitpress.errors import BitpressError, CheckpointError, DiskError
from bitpress.library import VERSION, library
from bitpress.runtime.native.architectures.layout import Layout, Rotation
from bitpress.runtime.native.architectures.steps import map_linears
from bitpress.runtime.native.architectures.table import RULES
from bitpress.runtime.native.engine import Bits, Parts
from bitpress.runtime.native.plain_tokenizer import PlainTokenizer
from bitpress.settings import layout_directory, usable_cores
from bitpress.version import __version__

__all__ = [
    "CachedLayout",
    "PlainConfig",
    "hash_manifest",
    "is_complete",
    "layout_path",
    "read_layout",
    "write_layout",
]

# Most layouts in the cache folder; those that were written or used last stay.
MOST_LAYOUTS = 8
_SETTINGS = ("eos_token_id", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class PlainConfig:
    """The part of a configuration that generating text needs."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int | list[int] | None

    def get_text_config(self) -> "PlainConfig":
        return self


@dataclass(frozen=True)
class CachedLayout:
    """A model that is laid out. `tokenizer` is None if transformers has to build it."""

    parts: Parts
    tokenizer: PlainTokenizer | None
    generation: Any
    file_bytes: int


def hash_manifest(manifest: bytes) -> str:
    """Return the SHA-256 of a manifest. The manifest holds that of every file, so it identifies everything that a layout is made of."""
    return hashlib.sha256(manifest).hexdigest()


def layout_path(manifest_hash: str, head: str, width: int | None = None) -> Path | None:
    """Return the path at which the layout of a model with a head of this format, at this width, is cached; None if caching is off."""
    folder = layout_directory()
    if folder is None:
        return None
    key = f"{__version__} {VERSION} {RULES} {head} {manifest_hash}" + (f" {width}" if width is not None else "")
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.layout"


def is_complete(directory: Path, manifest: bytes) -> bool:
    """Return whether every file of the manifest exists with its size; the content was checked when the model was laid out."""
    try:
        files = parse_json(manifest, str(directory / MANIFEST_NAME))["files"]
        return all((directory / name).stat().st_size == record["bytes"] for name, record in files.items())
    except (BitpressError, OSError, KeyError, TypeError, AttributeError):
        return False


def read_layout(path: Path, *, verify: bool = True) -> CachedLayout | None:
    """Map a cached layout. A broken one is removed and None returned: it is only a copy, and can be built again."""
    try:
        tree = read_prepared(path, verify=verify, threads=usable_cores())
        layout = _from_tree(tree)
    except (CheckpointError, KeyError, TypeError, ValueError):
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        path.touch()
    return layout


def write_layout(path: Path, parts: Parts, tokenizer: Any, generation: Any, file_bytes: int, model: str) -> bool:
    """Write a layout for the next start, with the name of the model for lists; return False if the disk has no room for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_prepared(path, {"model": model, **_to_tree(parts, tokenizer, generation, file_bytes)})
        _forget_old(path.parent)
    except (DiskError, OSError, ValueError):  # ValueError: a setting of the model that our own files cannot hold, such as NaN
        return False
    return True


def _forget_old(folder: Path) -> None:
    newest = sorted(folder.glob("*.layout"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest[MOST_LAYOUTS:]:
        with contextlib.suppress(OSError):
            path.unlink()


def _to_tree(parts: Parts, tokenizer: Any, generation: Any, file_bytes: int) -> dict[str, Any]:
    store = library().store_linear
    config = parts.config.get_text_config()
    plain = PlainTokenizer.of(tokenizer)
    layout = {field.name: _within(getattr(parts.layout, field.name)) for field in fields(Layout)}
    layout["rotations"] = [{"frequencies": r.frequencies, "factor": r.factor} for r in parts.layout.rotations]
    return {
        "config": {field.name: _within(getattr(config, field.name, None)) for field in fields(PlainConfig)},
        "layout": layout,
        "layers": [[map_linears(step, store) for step in layer] for layer in parts.layers],
        "final_norm": parts.final_norm,
        "embedding": None if parts.embedding is parts.head else store(parts.embedding),
        "head": store(parts.head),
        "head_format": parts.head_format,
        "expanded": parts.expanded,
        "bytes_per_token": parts.bytes_per_token,
        "bits": asdict(parts.bits),
        "prompt_cost": parts.prompt_cost,
        "inputs": parts.inputs,
        "file_bytes": file_bytes,
        "generation": None if generation is None else {name: _within(getattr(generation, name, None)) for name in _SETTINGS},
        "tokenizer": None if plain is None else plain.as_tree(),
    }


def _within(value: Any) -> Any:
    """Bound a number from another tool's file, such as a context of 10**30, by the largest that our own files hold."""
    return min(value, 2**63 - 1) if type(value) is int else value


def _from_tree(tree: Mapping[str, Any]) -> CachedLayout:
    restore = library().restore_linear
    head = restore(tree["head"])
    parts = Parts(
        config=PlainConfig(**tree["config"]),
        layout=_layout(tree["layout"]),
        layers=[[map_linears(step, restore) for step in layer] for layer in tree["layers"]],
        final_norm=tree["final_norm"],
        embedding=head if tree["embedding"] is None else restore(tree["embedding"]),
        head=head,
        head_format=tree["head_format"],
        expanded=tree["expanded"],
        bytes_per_token=tree["bytes_per_token"],
        bits=Bits(**tree["bits"]),
        prompt_cost=tree["prompt_cost"],
        inputs=tree["inputs"],
    )
    tokenizer, generation = tree["tokenizer"], tree["generation"]
    return CachedLayout(
        parts,
        None if tokenizer is None else PlainTokenizer.from_tree(tokenizer),
        None if generation is None else SimpleNamespace(**generation),
        tree["file_bytes"],
    )


def _layout(stored: Mapping[str, Any]) -> Layout:
    values = dict(stored)
    values["rotations"] = tuple(Rotation(np.asarray(r["frequencies"]), r["factor"]) for r in values["rotations"])
    values["rope"], values["window"] = tuple(values["rope"]), tuple(values["window"])
    return Layout(**values)
