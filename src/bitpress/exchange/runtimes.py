"""Runtimes that load what bitpress exports: which target each of them reads, and which formats it has for a number of bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bitpress.formats import SHORT

__all__ = ["RUNTIMES", "ForeignRuntime"]


@dataclass(frozen=True)
class ForeignRuntime:
    """One such runtime.

    target    what it loads, a row of `bitpress.exchange.table.EXPORTERS`
    formats   by bits: the formats that it computes with, the first that a weight's shape allows is taken
    inputs    patterns of the formats of weights beside which it rounds inputs as their layers say
    table     the format of an embedding table and of a head; keep: 16 bits
    name      of what is written, below the directory of the model
    joins     whether it joins weights that share an input into one product, so that they must have one format
    divides   whether it divides a model among devices by the rules of `bitpress.exchange.tensor_parallel`
    experts   which experts must have one format, those of a block or of the model; apart: none
    source    where the formats are from
    """

    about: str
    target: str
    formats: Mapping[int, tuple[str, ...]]
    inputs: tuple[str, ...]
    table: str
    name: str
    joins: bool
    divides: bool
    experts: Literal["apart", "block", "model"]
    source: str


def _types(*names: str) -> tuple[str, ...]:
    """Return the formats of llama.cpp's types by their own names."""
    return tuple(SHORT[name] for name in names)


_INTEGERS = {bits: tuple(f"int{bits}-{block}" for block in ("g128", "g64", "g32", "row")) for bits in (4, 8)}

RUNTIMES: dict[str, ForeignRuntime] = {
    "vllm": ForeignRuntime(
        about="vLLM and SGLang: integers without zero points in groups of 128, 64 or 32, or one for a row; everything else in 16 bits",
        target="compressed-tensors",
        formats=_INTEGERS,
        inputs=("int8-row",),
        table="keep",
        name="vllm",
        joins=True,
        divides=True,
        experts="block",
        source="vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py (4 and 8 bits in every "
        "version, others in new ones) and utils/marlin_utils.py (groups of 32, 64, 128, rows); of experts compressed_tensors_moe.py there",
    ),
    "transformers": ForeignRuntime(
        about="transformers with the package compressed-tensors, on any device",
        target="compressed-tensors",
        formats=_INTEGERS,
        inputs=("*",),
        table="keep",
        name="transformers",
        joins=False,
        divides=False,
        experts="model",
        source="compressed_tensors/compressors/pack_quantized; of experts transformers/integrations/compressed_tensors.py",
    ),
    "llama.cpp": ForeignRuntime(
        about="llama.cpp: K-quants where the inputs are a multiple of 256, blocks of 32 elsewhere; embeddings and head in Q8_0",
        target="gguf",
        formats={
            8: _types("q8_0"),
            6: _types("q6_k", "q8_0"),
            5: _types("q5_k", "q5_1"),
            4: _types("q4_k", "q4_1"),
            3: _types("q3_k", "iq4_nl"),
            2: _types("q2_k", "iq4_nl"),
        },
        inputs=(),
        table="int8-g32",
        name="model.gguf",
        joins=False,
        divides=False,
        experts="apart",
        source="ggml/src/ggml-common.h, and the types that llama.cpp's src/llama-quant.cpp falls back to",
    ),
    "mlx": ForeignRuntime(
        about="MLX: integers with a minimum in groups of 64 or 32; everything else in 16 bits",
        target="mlx",
        formats={bits: tuple(f"int{bits}-{block}-min" for block in ("g64", "g32")) for bits in (2, 3, 4, 5, 6, 8)},
        inputs=(),
        table="keep",
        name="mlx",
        joins=False,
        divides=False,
        experts="apart",
        source="mlx.core.quantize: groups of 32, 64 and 128, bits 2, 3, 4, 5, 6 and 8",
    ),
}
