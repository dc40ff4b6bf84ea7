"""Runtimes that load what bitpress exports: which target each of them reads, and which formats it has for a number of bits."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RUNTIMES", "ForeignRuntime"]


@dataclass(frozen=True)
class ForeignRuntime:
    """One such runtime.

    target    what it loads, a row of `bitpress.exchange.table.EXPORTERS`
    formats   by bits: the formats that it computes with, the first that a weight's shape allows is taken
    table     the format of an embedding table and of a head; keep: 16 bits
    name      of what is written, below the directory of the model
    source    where the formats are from
    """

    about: str
    target: str
    formats: Mapping[int, tuple[str, ...]]
    table: str
    name: str
    source: str


_INTEGERS = {bits: tuple(f"int{bits}-{block}" for block in ("g128", "g64", "g32", "row")) for bits in (4, 8)}

RUNTIMES: dict[str, ForeignRuntime] = {
    "vllm": ForeignRuntime(
        about="vLLM and SGLang: integers without zero points in groups of 128, 64 or 32, or one for a row; everything else in 16 bits",
        target="compressed-tensors",
        formats=_INTEGERS,
        table="keep",
        name="vllm",
        source="vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py (4 and 8 bits in every "
        "version, others in new ones) and utils/marlin_utils.py (groups of 32, 64, 128, rows)",
    ),
    "transformers": ForeignRuntime(
        about="transformers with the package compressed-tensors, on any device",
        target="compressed-tensors",
        formats=_INTEGERS,
        table="keep",
        name="transformers",
        source="compressed_tensors/compressors/pack_quantized",
    ),
}
