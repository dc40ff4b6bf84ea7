"""The file from which a model directory in the cache was converted: its name, its bytes, and how it stores its tensors.

It is recorded in `origin.json` of that directory. In any other directory, a file of that name belongs to the model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitpress.checkpoints.jsonfile import read_json
from bitpress.errors import CheckpointError
from bitpress.settings import cache_directory

__all__ = ["FILE", "ORIGIN", "Given", "is_in_cache", "read_file_name", "read_given"]

ORIGIN = "origin.json"
FILE = "file"  # its key for the name of the file, which is no part of what a report says
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Given:
    """A converted file, or several parts of one.

    file_type   the type that its header names, such as Q4_K_M
    types       bytes of its tensors by their type, the largest first
    """

    format: str
    file_type: str
    nbytes: int
    parts: int
    types: Mapping[str, int]

    @property
    def is_quantized(self) -> bool:
        return not _FLOATS.issuperset(self.types)

    @property
    def text(self) -> str:
        """One line for people, such as `GGUF Q4_K_M, quantized already: Q4_K 71 %, Q6_K 29 %`."""
        total = sum(self.types.values())
        shares = [(kind, 100 * count / total) for kind, count in sorted(self.types.items(), key=lambda item: -item[1])]
        shown = ", ".join(f"{kind} {share:.0f} %" for kind, share in shares if share >= 0.5)
        if self.is_quantized:
            return f"{self.format} {self.file_type}, quantized already: {shown}"
        return f"{self.format} {shares[0][0] if shares else self.file_type}, not quantized: {shown}"  # whatever its header says

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_given(root: Path) -> Given | None:
    """Return the file from which a directory of the cache was converted; None if unknown, or if `root` is not in the cache."""
    if not is_in_cache(root) or not (root / ORIGIN).is_file():
        return None
    try:
        values = read_json(root / ORIGIN)
        return Given(**values["given"])
    except (CheckpointError, KeyError, TypeError):
        return None


def read_file_name(root: Path) -> str | None:
    """Return the name of the file from which a directory of the cache was converted; older conversions do not say."""
    try:
        values = read_json(root / ORIGIN)
    except CheckpointError:
        return None
    name = values.get(FILE) if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def is_in_cache(root: Path) -> bool:
    """Claim that a directory is one that a conversion made in the cache."""
    root, cache = root.resolve(), cache_directory().resolve()
    return root.parent in (cache / "gguf", cache / "imported", cache / "models")
