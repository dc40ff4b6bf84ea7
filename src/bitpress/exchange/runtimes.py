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


RUNTIMES: dict[str, ForeignRuntime] = {
    "vllm": ForeignRuntime(
        about="vLLM and SGLang, weights in few bits and everything else in 16",
        target="gptq",
        formats={
            2: ("int2-g128", "int2-g64", "int2-g32", "int2-row"),
            3: ("int3-g128", "int3-g64", "int3-g32", "int3-row"),
            4: ("int4-g128", "int4-g64", "int4-g32", "int4-row"),
            8: ("int8-g128", "int8-g64", "int8-g32", "int8-row"),
        },
        table="keep",
        name="gptq",
        source="vllm/model_executor/layers/quantization/gptq.py: 2, 3, 4 and 8 bits",
    ),
}
