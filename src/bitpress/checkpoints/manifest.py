"""The manifest as a file: its name, and its bytes for those who need no more than that. Nothing here imports torch."""

from pathlib import Path

from bitpress.checkpoints.directory import safe_file
from bitpress.checkpoints.jsonfile import MAX_JSON_BYTES, read_json_bytes

__all__ = ["JOB_DIRECTORY", "MANIFEST_NAME", "is_compressed", "read_manifest_bytes"]

MANIFEST_NAME = "bitpress.json"
# What a directory holds while a job is not done.
JOB_DIRECTORY = ".bitpress"


def is_compressed(path: str | Path) -> bool:
    """Whether a directory presents itself as a bitpress model (which does not make it a valid one)."""
    return (Path(path) / MANIFEST_NAME).exists()


def read_manifest_bytes(directory: str | Path) -> bytes:
    """Read the manifest, unparsed. Raises CheckpointError."""
    return read_json_bytes(safe_file(Path(directory), MANIFEST_NAME), MAX_JSON_BYTES)
