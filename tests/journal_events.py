"""Named events of a job: what a run does on disk, in order, so that a test can stop it exactly there.

    identity, kept, objects 1, activations 1, journal 1 torn, journal 1, objects 2, ..., staged 1, ..., outer 1, ..., manifest, cleared

An event comes when the file is durably there; "torn" is the moment when half of a line of the journal is.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME
from bitpress.pipeline import journal

__all__ = ["kind_of", "one_of_each", "watch"]


def kind_of(event: str) -> str:
    """Return the event without its number."""
    return " ".join(word for word in event.split() if not word.isdigit())


def one_of_each(events: list[str]) -> list[str]:
    """Choose an event of every kind, by turns the first, the second, ... of its kind."""
    kinds: dict[str, list[str]] = {}
    for event in events:
        kinds.setdefault(kind_of(event), []).append(event)
    return [members[turn % len(members)] for turn, members in enumerate(kinds.values())]


class _Os(ModuleType):
    """`os` as the journal has it, with an event after every file that is put in place."""

    def __init__(self, placed: Callable[[], None]) -> None:
        super().__init__("os")
        self._placed = placed

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)
        self._placed()


def watch(reach: Callable[[str], None], put: Callable[[object, str, Any], None] = setattr) -> None:
    """Call `reach` with the name of every event from now on. `put` replaces an attribute: monkeypatch.setattr undoes that later."""
    counts: Counter[str] = Counter()
    write, append, clear = journal.write_durably, journal.append_durably, shutil.rmtree

    def write_durably(path: Path, chunks: Any) -> Any:
        if path.parent.name in ("objects", "activations") and path.parent.parent.name == JOB_DIRECTORY:
            counts[path.parent.name] += 1
            name = f"{path.parent.name} {counts[path.parent.name]}"
        elif path.parent.name == "kept" and path.parent.parent.name == JOB_DIRECTORY:
            name = "kept"
        elif path.name in (MANIFEST_NAME, "job.json"):
            name = "manifest" if path.name == MANIFEST_NAME else "identity"
        else:
            counts["outer"] += 1
            name = f"outer {counts['outer']}"
        written = write(path, chunks)
        reach(f"{name}")
        return written

    def append_durably(path: Path, line: bytes) -> None:
        counts["journal"] += 1
        name = f"journal {counts['journal']}"
        size = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(line[: len(line) // 2])
        reach(f"{name} torn")
        os.truncate(path, size)
        append(path, line)
        reach(f"{name}")

    def placed() -> None:
        counts["staged"] += 1
        reach(f"staged {counts['staged']}")

    def rmtree(path: Path, **options: Any) -> None:
        clear(path, **options)
        if path.name == JOB_DIRECTORY:
            reach("cleared")

    put(journal, "write_durably", write_durably)
    put(journal, "append_durably", append_durably)
    put(journal, "os", _Os(placed))
    tools = ModuleType("shutil")
    tools.rmtree = rmtree  # type: ignore[attr-defined]
    put(journal, "shutil", tools)
