"""The program `bitpress`, also `python -m bitpress`: the command line, and what is left to say when there is no memory to load it."""

import sys

from bitpress.exhaustion import is_out_of_memory

__all__ = ["main"]

MESSAGE = "error: out of memory: there is not enough to load the program; give it more, about 1 GB of address space at least.\n"


def main() -> None:
    """Run the command line. Memory that runs out while its modules load is one line and exit code 5 too."""
    try:
        from bitpress.cli.app import main as run

        run()
    except (MemoryError, ImportError, OSError, RuntimeError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(MESSAGE)
        sys.exit(5)


if __name__ == "__main__":
    main()
