"""Whether an error says that there is no more memory: it comes under many names, and each of them is exit code 5.

    MemoryError                    Python, numpy, std::bad_alloc of native code
    OSError ENOMEM                 fork, mmap, a file
    ImportError                    "failed to map segment from shared object", "cannot allocate memory"
    RuntimeError                   torch: "DefaultCPUAllocator: can't allocate memory", "unable to mmap", "CUDA out of memory";
                                   Python: "can't start new thread"
    any of these as the cause of another one, as lazy imports report it

Nothing is imported here that may not fit any more.
"""

import errno

__all__ = ["first_line", "is_out_of_memory"]

SIGNS = (
    "cannot allocate memory",
    "can't allocate memory",
    "can't start new thread",
    "failed to map segment",
    "out of memory",
    "std::bad_alloc",
    "unable to mmap",
)
# Of the space that a library asks for its threads' variables, which is fixed: other libraries took it, not other memory.
NOT_MEMORY = "static tls block"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came from, is for want of memory."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, (ImportError, OSError, RuntimeError, SystemError)):
            text = str(error).lower()
            if NOT_MEMORY not in text and any(sign in text for sign in SIGNS):
                return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def first_line(error: BaseException) -> str:
    """Return an error's text without the rest that libraries put below it, and without a full stop at its end."""
    return (str(error).splitlines() or [""])[0].strip().rstrip(".")
