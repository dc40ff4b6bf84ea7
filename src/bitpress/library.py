"""The native library: whether it was built, and the processor features that it can use. Does not import torch."""

import functools
import importlib
from types import ModuleType

from bitpress.errors import KernelUnavailable, UsageError
from bitpress.settings import code_path, use_native

__all__ = ["VERSION", "available", "built_library", "chosen_path", "code_paths", "features", "library"]

# The version of the interface between the library and `native`, raised whenever a function changes. An older library is not used.
VERSION = 23


@functools.cache
def _find_library() -> ModuleType | None:
    try:
        library = importlib.import_module("bitpress._native")
    except ImportError:
        return None
    return library if getattr(library, "version", 0) == VERSION else None


def library() -> ModuleType:
    """Return the library. Raises KernelUnavailable if it was not built or is switched off."""
    if not use_native():
        raise KernelUnavailable("native code is switched off by BITPRESS_NATIVE=off; unset it.")
    return built_library()


def built_library() -> ModuleType:
    """Return the library even if it is switched off. Raises KernelUnavailable if it was not built."""
    library = _find_library()
    if library is None:
        raise KernelUnavailable(
            "the native library was not built for this version: install a C++ compiler and Python's headers, then bitpress again."
        )
    return library


def available() -> bool:
    """Return whether native code was built and is switched on."""
    return use_native() and _find_library() is not None


def features() -> frozenset[str]:
    """Return the features of this processor for native code ("avx512", "amx-bf16"); empty without the library."""
    return frozenset(built_library().features()) if available() else frozenset()


def code_paths() -> tuple[str, ...]:
    """Return the code paths that this processor supports, the best one first; none without the library."""
    return tuple(built_library().paths()) if available() else ()


def chosen_path() -> str:
    """Return the code path of products. Raises KernelUnavailable, and UsageError for an unsupported BITPRESS_PATH."""
    paths = library().paths()
    if code_path() not in ("", *paths):
        raise UsageError(f"BITPRESS_PATH: {code_path()!r} is not there; this processor runs {', '.join(paths)}.")
    return code_path() or str(paths[0])
