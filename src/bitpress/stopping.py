"""Stopping on request: a signal is recorded, and the work ends at its next safe point."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitpress.errors import JobStopped

__all__ = ["stoppable"]


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Turn SIGINT and SIGTERM into JobStopped at the next safe point; a second signal ends the process at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)

    def check() -> None:
        if asked:
            name = signal.Signals(asked[0]).name
            raise JobStopped(f"stopped by {name}; what is finished is kept, the same command goes on from there.")

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
