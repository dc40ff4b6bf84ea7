"""The directory of a comparison.

    OUT/compare.json      what all recipes are compared on: hashes of the source and of the texts' tokens, the arithmetic, versions
    OUT/results.jsonl     a line for every recipe that is done, in the order of time
    OUT/capture/          what passes over the original have left; made again where it is missing
    OUT/models/           compressed models, if they are kept
    OUT/compare.html      the table and the picture; OUT/compare.svg the picture

A line is fsynced before the next recipe begins; a torn last line has not happened. One process works here at a time.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress.checkpoints.durable import append_durably, read_regular, write_durably
from bitpress.checkpoints.jsonfile import parse_json, read_json, write_json_bytes
from bitpress.errors import CheckpointError, DiskError, UsageError
from bitpress.pipeline.journal import differences

__all__ = ["Results"]

IDENTITY = "compare.json"
ROWS = "results.jsonl"


class Results:
    """An open comparison: the directory is locked until `close`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self._lock: int | None = None

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, Any]) -> "Results":
        """Begin or take up a comparison. Raises UsageError when the directory is something else's, or another comparison's."""
        cls.check_vacant(out)
        results = cls(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            results._lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(results._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            results.close()
            raise UsageError(f"{out}: another process is comparing here; wait for it or stop it.") from error
        except OSError as error:
            raise DiskError(f"{out}: {error.strerror or error}; make room or choose another directory.") from error
        try:
            results._take_up(json.loads(json.dumps(identity)))
        except BaseException:
            results.close()
            raise
        return results

    @staticmethod
    def check_vacant(out: Path) -> None:
        """Raise UsageError when `out` is a file or holds anything but a comparison."""
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out}: is a file; OUT is the directory to make.")
        if out.is_dir() and not (out / IDENTITY).exists() and {file.name for file in out.iterdir()} - {f"{IDENTITY}.tmp"}:
            raise UsageError(f"{out}: holds something else than a comparison; choose an empty or a new directory.")

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row. When this returns, it survives a kill."""
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
        append_durably(self.out / ROWS, line.encode() + b"\n")
        self.rows.append(json.loads(line))

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the newest row that has all of these values, if there is one."""
        wanted = json.loads(json.dumps(wanted))
        return next((row for row in reversed(self.rows) if wanted.items() <= row.items()), None)

    def _take_up(self, identity: dict[str, Any]) -> None:
        path = self.out / IDENTITY
        if path.exists():
            changed = differences(read_json(path), identity)
            if changed:
                raise UsageError(f"{self.out}: holds a comparison that differs in {'; '.join(changed)}. Choose another OUT.")
        else:
            write_durably(path, [write_json_bytes(identity)])
        self._read_rows()

    def _read_rows(self) -> None:
        path = self.out / ROWS
        if not path.exists():
            return
        data = read_regular(path)
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
                raise CheckpointError(f"{path}:{number}: is no row of a comparison; take the line away or choose another OUT.")
            self.rows.append(row)
        if torn:
            os.truncate(path, len(data) - len(torn))
