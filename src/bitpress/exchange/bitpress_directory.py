"""Our own directories, and how they store a layer: its tensors by name, its specifications in the manifest.

tensors   term0.codes, term0.scale, in.order, input.scale, ...
entry     {"spec": {"shape", "terms", "input_map", "output_map"}, "input": {"format", "parameters"}}; `input` only where there is one
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.errors import FormatError
from bitpress.exchange.source import Source, StoredLayer
from bitpress.formats import CompressedLayer

__all__ = ["BitpressDirectory"]


class BitpressDirectory:
    about: ClassVar[str] = "a directory that bitpress wrote; layers keep their codes"

    @staticmethod
    def owns(path: Path) -> bool:
        return is_compressed(path)

    @staticmethod
    def open(path: Path) -> Source:
        return CompressedCheckpoint.open(path)

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        return None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        input_spec = layer.input_spec()
        entry = {"spec": layer.weight.spec()} | ({} if input_spec is None else {"input": input_spec})
        return StoredLayer(layer.tensors(), entry)

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        if not {"spec"} <= set(stored.entry) <= {"spec", "input"}:
            raise FormatError(f"a layer's entry holds spec and, at most, input, not {sorted(stored.entry)}.")
        return CompressedLayer.build(stored.entry["spec"], stored.tensors, stored.entry.get("input"))
