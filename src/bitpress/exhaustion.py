"""Whether an error means that memory ran out: such errors have many names, and each leads to exit code 5.

    MemoryError                    Python, numpy, std::bad_alloc of native code
    OSError ENOMEM                 fork, mmap, a file
    ImportError                    "failed to map segment from shared object", "cannot allocate memory"
    RuntimeError                   torch: "DefaultCPUAllocator: can't allocate memory", "unable to mmap", "CUDA out of memory";
                                   Python: "can't start new thread"
    any of these as the cause of another one, as lazy imports report it

Nothing is imported here, since it might not fit into memory any more.
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
# The fixed space for a library's thread-local variables is used up by other libraries; memory did not run out.
NOT_MEMORY = "static tls block"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, means that memory ran out."""
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
    """Return the first line of an error's text, without a full stop at its end."""
    return (str(error).splitlines() or [""])[0].strip().rstrip(".")
