"""Limits on this process, and on code that comes with data, such as a chat template: it may loop or allocate without end."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TEMPLATE_BYTES", "TEMPLATE_SECONDS", "address_space_left", "bounded"]

# A template renders a conversation in milliseconds and kilobytes.
TEMPLATE_SECONDS = 5.0
TEMPLATE_BYTES = 256 * 2**20


@contextmanager
def bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """Limit the time (in the main thread, where signals arrive) and the additional memory (on Linux) of the block inside.

    Raises RuntimeError when the time is over and MemoryError when the memory is.
    """

    def expire(*_: object) -> None:
        raise RuntimeError(f"it ran for more than {seconds:g} seconds")

    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, expire) if timed else None
    try:
        if sys.platform == "linux":
            wanted = _address_space() + num_bytes
            resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))
        if timed:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def address_space_left() -> int | None:
    """Return the remaining bytes of this process's address space limit (ulimit -v), or None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY or sys.platform != "linux" else max(soft - _address_space(), 0)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
