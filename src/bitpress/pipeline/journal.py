"""The job: the files that make a long run resumable. One writer, one journal; a unit of work is wholly on disk or did not happen.

    OUT/.bitpress/job.json          the identity: hashes of the source, of the calibration tokens, the recipe, versions
    OUT/.bitpress/lock              held while a process works here, whose number it has
    OUT/.bitpress/journal.jsonl     one line a finished unit, each with a CRC; a torn last line is ignored
    OUT/.bitpress/objects/          finished weight files, under their final names
    OUT/.bitpress/activations/      the exact inputs of the next block
    OUT/.bitpress/kept/             tensors that were measured once, before the first unit

A unit is committed in this order: its weight file, the activations after it, its journal line; each is fsynced before the next. Units that are
committed together happen all or not at all: their lines are one append, and a line that says "joined" counts with the next one only. A unit
that replaces an earlier one (`replaces`) has a file of another name, and stands in its place from then on.
Publishing renames the weight files into OUT and writes the manifest last.
"""

import concurrent.futures
import contextlib
import os
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME
from bitpress.checkpoints.directory import check_file_name
from bitpress.checkpoints.durable import (
    append_durably,
    fsync_directory,
    hash_file,
    open_regular,
    read_into,
    write_durably,
)
from bitpress.checkpoints.exports import remove_exports
from bitpress.checkpoints.jsonfile import read_json, write_json_bytes
from bitpress.checkpoints.locks import JOB_LOCK, is_same, lock_alone, working_process
from bitpress.checkpoints.safetensors_file import TensorsOnDisk, read_header, read_tensor, serialize
from bitpress.checkpoints.side_files import check_listed_name
from bitpress.errors import CheckpointError, DiskError, UsageError
from bitpress.exchange.runtimes import RUNTIMES
from bitpress.pipeline.units import After, Unit, Work, add_, line_of, read_unit

__all__ = ["Job", "check_vacant", "differences"]

# The meaning of a field that an identity leaves out.
ABSENT = {"device": "cpu"}


class Job:
    """An open job: the lock is held until `close`."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out = out
        self.root = out / JOB_DIRECTORY
        self.identity = dict(identity)
        self.units: list[Unit] = []
        self._lock: int | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "bitpress-journal")
        self._pending: concurrent.futures.Future[None] | None = None

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, Any], *, force: bool = False) -> "Job":
        """Start or resume the job of a directory.

        Raises UsageError if another process works there, if the directory holds something else, or if its job is another one
        (the fields that differ are named). With `force`, another job of bitpress, or a damaged one, is discarded.
        """
        job = cls(out, identity)
        check_vacant(out)
        if job.root.is_symlink():
            raise UsageError(f"{job.root}: is a link; a job works in a directory of its own.")
        with _disk_errors(job.root):
            (job.root / "objects").mkdir(parents=True, exist_ok=True)
            (job.root / "activations").mkdir(exist_ok=True)
        job._acquire()
        try:
            job._take_up(force)
        except BaseException:
            job.close()
            raise
        return job

    def _take_up(self, force: bool) -> None:
        known = self.root / "job.json"
        if known.exists():
            changed = differences(read_json(known), self.identity)
            if changed and not force:
                raise UsageError(
                    f"{self.out}: holds an unfinished job that differs in {'; '.join(changed)}. Use --force to discard it."
                )
            if changed:
                known.unlink()
        if not known.exists():
            # Files without an identity are the rest of a job that was discarded, or removed, halfway.
            self._discard()
            write_durably(known, [write_json_bytes(self.identity)])
        try:
            self._read_journal()
            self._find_activations()
            self._check_kept()
        except CheckpointError:
            if not force:
                raise
            self._discard()

    def close(self) -> None:
        """Release the directory, after the unit in work is written."""
        self._writer.shutdown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def commit_together_behind(self, works: Sequence[Work], activations: torch.Tensor | None) -> None:
        """Commit units, all or none of them, while the next one is worked on. The arguments may not change before `settle` has returned."""
        self.settle()
        self._pending = self._writer.submit(self.commit_together, works, activations)

    def settle(self) -> None:
        """Wait until the last unit is durable; raise the error of its commit, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def commit(
        self,
        unit: str,
        shard: str,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
        activations: torch.Tensor | None,
    ) -> None:
        """Make a unit durable. When this returns, the unit survives a kill."""
        self.commit_together([Work(unit, shard, tensors, facts)], activations)

    def commit_together(self, works: Sequence[Work], activations: torch.Tensor | None, *, replaces: bool = False) -> None:
        """Make units durable, all or none of them; the activations are those behind the last one. With `replaces` they stand in the places of
        the units of their names, whose files stay until the job ends."""
        by_name, files = {unit.unit: unit for unit in self.units}, []
        for work in works:
            if work.tensors is None:
                files.append((by_name[work.unit].bytes, by_name[work.unit].sha256))
            else:
                files.append(write_durably(self.root / "objects" / work.shard, serialize(work.tensors, {"format": "pt"})))
        after = None
        if activations is not None:
            name = f"{len(self.units) + len(works) - 1:05d}.safetensors"
            _, left = write_durably(self.root / "activations" / name, serialize({"hidden": activations}, None))
            after = After(file=name, sha256=left)
        units = [
            Unit(
                unit=work.unit,
                shard=work.shard,
                bytes=size,
                sha256=digest,
                facts=dict(work.facts),
                after=after if at == len(works) - 1 else None,
                joined=at < len(works) - 1,
                replaces=replaces,
            )
            for at, (work, (size, digest)) in enumerate(zip(works, files, strict=True))
        ]
        append_durably(self.root / "journal.jsonl", b"".join(map(line_of, units)))
        for unit in units:
            add_(self.units, unit)
        if not replaces:
            for old in (self.root / "activations").iterdir():
                if after is None or old.name != after.file:
                    old.unlink()

    def find(self, unit: Unit) -> Path:
        """Return where a unit's file lies: in the job's folder, or where it is published."""
        made = self.root / "objects" / unit.shard
        return made if made.exists() else self.out / unit.shard

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Store tensors that were measured before the first unit; return their hashes, which that unit's facts must hold as `kept`."""
        with _disk_errors(self.root / "kept"):
            (self.root / "kept").mkdir(exist_ok=True)
        _, digest = write_durably(self.root / "kept" / name, serialize(tensors, None))
        return {name: digest}

    def kept(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors kept under `name`, each read when it is asked for."""
        return TensorsOnDisk(self.root / "kept" / name)

    def _check_kept(self) -> None:
        listed = self.units[0].facts.get("kept") or {} if self.units else {}
        if not isinstance(listed, dict):
            raise CheckpointError(f"{self.root / 'journal.jsonl'}:1: is not a unit of work; start again with --force.")
        for name, digest in listed.items():
            check_file_name(str(self.root / "journal.jsonl"), name)
            path = self.root / "kept" / name
            if not path.is_file() or hash_file(path) != digest:
                raise CheckpointError(f"{path}: is missing or damaged; start again with --force.")

    def activations(self) -> torch.Tensor | None:
        """Return the tensors that the last finished unit left for the next block. Raises CheckpointError if the file was changed."""
        path = self._find_activations()
        return None if path is None else read_tensor(path, read_header(path)[0]["hidden"])

    def _find_activations(self) -> Path | None:
        after = self.units[-1].after if self.units else None
        if after is None:
            return None
        path: Path = self.root / "activations" / after.file
        if not path.exists() or hash_file(path) != after.sha256:
            raise CheckpointError(f"{path}: is missing or damaged; start again with --force.")
        return path

    def publish(self, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Move everything into place, the manifest last, and remove the job's own folder."""
        self.stage(files)
        write_durably(self.out / MANIFEST_NAME, [manifest])
        shutil.rmtree(self.root)
        fsync_directory(self.out)

    def stage(self, files: Mapping[str, bytes]) -> None:
        """Move weight files and `files` into place, without the manifest; safe to repeat after a kill."""
        self._retire_previous({unit.shard for unit in self.units} | set(files))
        for unit in self.units:
            made, final = self.root / "objects" / unit.shard, self.out / unit.shard
            if made.exists():
                with _disk_errors(final):
                    os.replace(made, final)
            elif not final.exists():
                raise CheckpointError(f"{made}: a finished weight file is gone; start again with --force.")
        for name, content in files.items():
            with _disk_errors(self.out / name):
                (self.out / name).parent.mkdir(exist_ok=True)
            if "/" in name and (self.out / name).parent.is_symlink():
                raise UsageError(f"{(self.out / name).parent}: is a link; remove it.")
            write_durably(self.out / name, [content])
        fsync_directory(self.out)

    def unstage(self, names: Collection[str]) -> None:
        """Take back what `stage` put in place: the weight files into the job's folder, the files of these names away."""
        for unit in self.units:
            made, final = self.root / "objects" / unit.shard, self.out / unit.shard
            if final.exists():
                with _disk_errors(final):
                    os.replace(final, made)
        with _disk_errors(self.out):
            for name in names:
                (self.out / name).unlink(missing_ok=True)
            for folder in {(self.out / name).parent for name in names} - {self.out}:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        fsync_directory(self.out)

    def _retire_previous(self, kept: Collection[str]) -> None:
        """Remove the model that is being replaced from the directory: first the files that only it has, then its manifest."""
        manifest = self.out / MANIFEST_NAME
        if not manifest.exists():
            return
        old: Any = None
        with contextlib.suppress(CheckpointError):  # a manifest that cannot be read lists no files
            old = read_json(manifest)
        listed = old["files"] if isinstance(old, dict) and isinstance(old.get("files"), dict) else ()
        for name in listed:
            check_listed_name(str(manifest), name)
        with _disk_errors(manifest):
            for name in listed:
                if name not in kept:
                    (self.out / name).unlink(missing_ok=True)
            remove_exports(self.out, {runtime.name for runtime in RUNTIMES.values()})  # of the model that goes
            manifest.unlink()  # last: if this is interrupted, the manifest still lists the files to remove
        fsync_directory(self.out)

    def _acquire(self) -> None:
        path = self.root / JOB_LOCK
        with _disk_errors(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not lock_alone(self._lock):
            self.close()
            raise UsageError(
                f"{self.out}: {working_process(self.root) or 'another process'} works here; wait for it or stop it."
            )
        if not is_same(self._lock, path):  # the process that held it has finished meanwhile, and removed its folder
            self.close()
            raise UsageError(f"{self.out}: another process has just finished here; run the command again.")
        with _disk_errors(path):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def _discard(self) -> None:
        with _disk_errors(self.root):
            (self.root / "journal.jsonl").unlink(missing_ok=True)
            shutil.rmtree(self.root / "kept", ignore_errors=True)
            for folder in ("objects", "activations"):
                shutil.rmtree(self.root / folder)
                (self.root / folder).mkdir()
        self.units.clear()

    def _read_journal(self) -> None:
        path = self.root / "journal.jsonl"
        if not path.exists():
            return
        with open_regular(path) as (descriptor, num_bytes):
            data = bytearray(num_bytes)
            read_into(path, descriptor, memoryview(data), 0)
        *lines, torn = data.split(b"\n")
        units = list[Unit]()
        for number, raw in enumerate(lines):
            crc, _, payload = raw.partition(b" ")
            if crc != b"%08x" % zlib.crc32(payload):
                raise CheckpointError(f"{path}: line {number + 1} is damaged; start again with --force.")
            units.append(read_unit(f"{path}:{number + 1}", bytes(payload)))
        unfinished = len(torn)
        while units and units[-1].joined:  # it happens with the next one only
            units.pop()
            unfinished += len(lines.pop()) + 1
        if unfinished:
            # Lines that were being written when the process was killed: those units did not happen.
            with _disk_errors(path), path.open("r+b") as file:
                file.truncate(len(data) - unfinished)
                os.fsync(file.fileno())
        for unit in units:
            add_(self.units, unit)
        for unit in self.units:
            present = self.find(unit)
            if not present.exists() or hash_file(present) != unit.sha256:
                raise CheckpointError(f"{present}: a finished weight file is missing or damaged; start again with --force.")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(
            f"{path}: {reason}; make room or repair the disk, then run the same command again to resume."
        ) from error


def check_vacant(out: Path) -> None:
    """Raise UsageError if `out` is a file or holds anything but a job of bitpress."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; OUT is the directory to write.")
    if out.is_dir() and any(out.iterdir()) and not (out / JOB_DIRECTORY).exists() and not (out / MANIFEST_NAME).exists():
        raise UsageError(f"{out}: holds something else; choose an empty or a new directory.")


def differences(known: Any, wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the fields in which two identities differ, with both values if they are short."""
    known = known if isinstance(known, dict) else {}
    changed = []
    for key in sorted(set(known) | set(wanted)):
        absent = ABSENT.get(key)
        a, b = known.get(key, absent), wanted.get(key, absent)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = len(str(a)) + len(str(b)) < 60
            changed.append(f"{prefix}{key} ({a} there, {b} here)" if short else f"{prefix}{key}")
    return changed
