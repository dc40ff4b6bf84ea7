"""Memory of this process: what it holds, and giving back what it no longer uses."""

import ctypes
import resource
import sys

import psutil

__all__ = ["peak_bytes", "release", "resident_bytes"]


def release() -> None:
    """Return freed memory to the system where the C library can (glibc keeps tens of megabytes a block otherwise)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The largest resident size since the process began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
