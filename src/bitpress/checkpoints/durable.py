"""Files that are either whole and on the disk, or not there at all.

A new file:  <path>.tmp -> write -> flush -> fsync(file) -> rename -> fsync(directory).
A journal:   append one line -> fsync(file); fsync(directory) when the file is new. An append that fails is taken back.

If a write stops (full disk, failing generator, interrupt), the partial file is removed. Only a killed process leaves
`<path>.tmp` behind, and the next write of the same path replaces it. There is one writer per path: the caller holds the
lock. Reading is here too: only regular files are opened, so that a pipe or a device cannot block the reader.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from bitpress.errors import CheckpointError, DiskError

__all__ = ["append_durably", "fsync_directory", "hash_file", "open_regular", "read_into", "read_regular", "write_durably"]

_READ_BLOCK = 2**20
_WRITE_BLOCK = 2**23  # one call of write(2): short enough that an interrupt is answered at once
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write the chunks as the new content of `path`; return the number of bytes and their SHA-256 in hex.

    An error that `chunks` itself raises passes unchanged; one of the disk becomes a DiskError. The former content of
    `path` stays until the rename.
    """
    partial = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    num_bytes = 0
    descriptor = -1
    try:
        with _disk_errors(path, num_bytes):
            partial.unlink(missing_ok=True)  # of a killed run; O_EXCL then never follows or shares what lies there
            descriptor = os.open(partial, _NEW_FILE, 0o666)
        for chunk in chunks:
            for block in _blocks(chunk):
                digest.update(block)
                num_bytes += _write_all(descriptor, block, path, num_bytes)
        with _disk_errors(path, num_bytes):
            os.fsync(descriptor)
            closing, descriptor = descriptor, -1
            os.close(closing)
            os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to show
            partial.unlink(missing_ok=True)
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        raise
    fsync_directory(path.parent)
    return num_bytes, digest.hexdigest()


def append_durably(path: Path, line: bytes) -> None:
    """Append `line` (the caller ends it with a newline), return when it is on the disk; take back a failed append."""
    with _disk_errors(path, 0):
        descriptor, is_new = _open_to_append(path)
    num_bytes_before = -1
    try:
        with _disk_errors(path, 0):
            num_bytes_before = os.fstat(descriptor).st_size
        num_bytes = 0
        for block in _blocks(line):
            num_bytes += _write_all(descriptor, block, path, num_bytes)
        with _disk_errors(path, num_bytes):
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):  # a torn line would swallow the line that is appended after it
            if is_new:
                path.unlink(missing_ok=True)
            elif num_bytes_before >= 0:
                os.ftruncate(descriptor, num_bytes_before)
        raise
    finally:
        with contextlib.suppress(OSError):  # fsync has reported what there was to report
            os.close(descriptor)
    if is_new:
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in the directory `path` durable: a rename or a new file is not, until this returns."""
    with _disk_errors(path, None):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system keeps no such promise for directories
                raise
        finally:
            os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file in hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_READ_BLOCK))
    with open_regular(path) as (descriptor, num_bytes):
        for start in range(0, num_bytes, _READ_BLOCK):
            part = block[: min(_READ_BLOCK, num_bytes - start)]
            read_into(path, descriptor, part, start)
            digest.update(part)
    return digest.hexdigest()


def read_regular(path: Path) -> bytes:
    """Read a whole regular file. Raises CheckpointError for anything else."""
    with open_regular(path) as (descriptor, num_bytes):
        data = bytearray(num_bytes)
        read_into(path, descriptor, memoryview(data), 0)
    return bytes(data)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading; return its descriptor and its size in bytes. Raises CheckpointError for anything else."""
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_into(path: Path, descriptor: int, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of the file from `start` on. Raises CheckpointError if the file ends early."""
    done = 0
    while done < len(view):  # one call moves at most 0x7ffff000 bytes
        try:
            num_read = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {start + done}: {_reason(error)}.") from error
        if num_read == 0:
            raise CheckpointError(
                f"{path}: ends at byte {start + done}, but {len(view)} bytes from {start} on are needed; "
                "the file is cut short: copy it again."
            )
        done += num_read


def _blocks(chunk: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(chunk).cast("B")
    for start in range(0, len(view), _WRITE_BLOCK):
        yield view[start : start + _WRITE_BLOCK]


def _write_all(descriptor: int, block: memoryview, path: Path, num_bytes_before: int) -> int:
    done = 0
    while done < len(block):
        with _disk_errors(path, num_bytes_before + done):
            num_written = os.write(descriptor, block[done:])
            if num_written == 0:
                raise OSError(errno.EIO, "the system wrote nothing and named no error")
        done += num_written
    return done


def _open_to_append(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags), False
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True


@contextlib.contextmanager
def _disk_errors(path: Path, num_bytes: int | None) -> Iterator[None]:
    """Turn an OSError into a DiskError that names the path, the bytes written so far and what to do."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        written = "directory not synced" if num_bytes is None else f"write failed after {num_bytes} bytes"
        raise DiskError(
            f"{path}: {written}: {_reason(error)}. The partial file was removed; "
            "free space or repair the disk, then run the same command again: it resumes."
        ) from error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
