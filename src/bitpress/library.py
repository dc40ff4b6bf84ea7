"""The native library itself: whether it is there, and what this processor offers to it. Imports no torch."""

import functools
import importlib
from types import ModuleType

from bitpress.errors import KernelUnavailable, UsageError
from bitpress.settings import code_path, use_native

__all__ = ["VERSION", "available", "built_library", "chosen_path", "code_paths", "features", "library"]

# What the library and `native` agree on; raised whenever a function of it changes. A library left over from before is not used.
VERSION = 14


@functools.cache
def _find_library() -> ModuleType | None:
    try:
        library = importlib.import_module("bitpress._native")
    except ImportError:
        return None
    return library if getattr(library, "version", 0) == VERSION else None


def library() -> ModuleType:
    """Return the library itself. Raises KernelUnavailable where it was not built, or is not wanted."""
    if not use_native():
        raise KernelUnavailable("native code is switched off by BITPRESS_NATIVE=off; unset it.")
    return built_library()


def built_library() -> ModuleType:
    """Return the library whether it is wanted or not. Raises KernelUnavailable where it was not built."""
    library = _find_library()
    if library is None:
        raise KernelUnavailable(
            "the native library was not built for this version: install a C++ compiler and Python's headers, then bitpress again."
        )
    return library


def available() -> bool:
    """Say whether native code is there and wanted."""
    return use_native() and _find_library() is not None


def features() -> frozenset[str]:
    """Name what this processor offers to native code ("avx512", "amx-bf16"); empty without it."""
    return frozenset(built_library().features()) if available() else frozenset()


def code_paths() -> tuple[str, ...]:
    """Name the code paths of products that this processor runs, the best one first; none without the library."""
    return tuple(built_library().paths()) if available() else ()


def chosen_path() -> str:
    """Return the code path that products take. Raises KernelUnavailable, UsageError for a BITPRESS_PATH that is not there."""
    paths = library().paths()
    if code_path() not in ("", *paths):
        raise UsageError(f"BITPRESS_PATH: {code_path()!r} is not there; this processor runs {', '.join(paths)}.")
    return code_path() or str(paths[0])
