"""A nested model at one of its widths: load 8 bits a weight, or only the upper 4 or 2 of them.

`formats.nested` names the sources, and says which formats are nested and what their upper bits mean.
"""

from dataclasses import replace
from pathlib import Path

from bitpress.checkpoints.budget import within
from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.errors import UsageError
from bitpress.formats.nested import NESTED_WIDTHS, is_nested

__all__ = ["at_width", "open_part"]


def at_width(checkpoint: CompressedCheckpoint, width: int) -> CompressedCheckpoint:
    """Return the checkpoint with its nested weights read at `width` bits. Raises UsageError where none is nested, or for other widths."""
    if width not in NESTED_WIDTHS or isinstance(width, bool):
        raise UsageError(f"width={width!r}: a nested model can be read at {_either(NESTED_WIDTHS)} bits a weight.")
    if not any(is_nested(record.spec) for record in checkpoint.manifest.weights.values()):
        raise UsageError(
            f"{checkpoint.root}: no weight is nested, so it has one width; leave out the width, or quantize with weights such as "
            "bipolar8-g64-nested."
        )
    return replace(checkpoint, width=width)


def open_part(directory: str | Path, memory: int | str | None = None, width: int | None = None) -> CompressedCheckpoint | None:
    """Open a directory within a budget of bytes or at a width; None where all of it is asked for.

    Raises UsageError for a model that bitpress did not write, or that has no such parts; MemoryLimitError, CheckpointError.
    """
    if memory is None and width is None:
        return None
    if not is_compressed(directory):
        named = "memory" if width is None else "width"
        raise UsageError(f"{directory}: bitpress did not write this model, so it cannot be loaded in part; leave out {named}.")
    checkpoint = CompressedCheckpoint.open(directory)
    checkpoint = checkpoint if memory is None else within(checkpoint, memory)
    return checkpoint if width is None else at_width(checkpoint, width)


def _either(widths: tuple[int, ...]) -> str:
    *others, last = map(str, widths)
    return f"{', '.join(others)} or {last}"
