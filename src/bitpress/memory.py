"""Memory of this process: its use, and the release of unused memory."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import psutil

__all__ = ["peak_bytes", "release", "reset_peak", "resident_bytes"]


def release() -> None:
    """Return freed memory to the system if the C library can (glibc otherwise keeps tens of megabytes per block)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Reset `peak_bytes`, if the system supports that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the largest resident size since the process began, or since `reset_peak`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
