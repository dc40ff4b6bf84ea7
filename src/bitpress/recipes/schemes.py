"""Schemes: how weights and the inputs of products are stored together, by the field's usual names, as keys of a recipe.

`w8a8` is 8 bits for weights and 8 for activations. What stands in a scheme can be replaced key by key: `--scheme w4a8 --weights int3-g64`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitpress.errors import fold, unknown_name

__all__ = ["SCHEMES", "Scheme", "scheme_keys"]


@dataclass(frozen=True)
class Scheme:
    """`keys` are those of a recipe; `source` says who stores and rounds in this way."""

    summary: str
    source: str
    keys: Mapping[str, Any]


_SMOOTH = ({"name": "smoothquant"},)
_SMOOTH_ROTATED = ({"name": "smoothquant"}, {"name": "hadamard"})
_STATIC = {"parameters": "static", "observer": {"name": "mse"}}

SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(
        "8-bit integers: a scale for every output channel, and for every token",
        "INT8 of compressed-tensors",
        {"weights": "int8-row", "quantizer": {"name": "gptq"}, "transforms": _SMOOTH, "inputs": "int8-row-fp32"},
    ),
    "w8a8-static": Scheme(
        "8-bit integers: a scale for every output channel, and one with a zero point for each input, chosen on calibration text",
        "W8A8 of compressed-tensors with static inputs",
        {
            "weights": "int8-row",
            "quantizer": {"name": "gptq"},
            "transforms": _SMOOTH,
            "inputs": {"format": "int8-tensor-zero", **_STATIC},
        },
    ),
    "w4a8": Scheme(
        "4-bit weights in groups of 64, 8-bit tokens",
        "W4A8 of compressed-tensors, in groups of 64 in place of 128",
        {"weights": "int4-g64", "quantizer": {"name": "gptq"}, "transforms": _SMOOTH, "inputs": "int8-row-fp32"},
    ),
    "w6a6": Scheme(
        "6-bit integers behind smoothing and random Hadamard rotations: a scale for every output channel, and for every token",
        "nobody's preset; the same as w8a8 in 6 bits",
        {"weights": "int6-row", "quantizer": {"name": "gptq"}, "transforms": _SMOOTH_ROTATED, "inputs": "int6-row-fp32"},
    ),
    "w4a4": Scheme(
        "4-bit integers behind smoothing and random Hadamard rotations: a scale for every output channel, and for every token",
        "nobody's preset; the same as w8a8 in 4 bits",
        {
            "weights": "int4-row",
            "quantizer": {"name": "gptq"},
            "transforms": _SMOOTH_ROTATED,
            "inputs": "int4-row-fp32",
        },
    ),
    "fp8": Scheme(
        "8-bit floats (E4M3): a scale for every output channel, and for every token",
        "FP8_DYNAMIC of compressed-tensors",
        {"weights": "e4m3-row", "quantizer": {"name": "rtn"}, "transforms": (), "inputs": "e4m3-row-fp32"},
    ),
    "fp8-static": Scheme(
        "8-bit floats (E4M3): a scale for every weight matrix, and one for each input, chosen on calibration text",
        "FP8 of compressed-tensors",
        {
            "weights": "e4m3-tensor",
            "quantizer": {"name": "rtn"},
            "transforms": (),
            "inputs": {"format": "e4m3-tensor", "parameters": "static", "observer": {"name": "minmax"}},
        },
    ),
    "fp8-block": Scheme(
        "8-bit floats (E4M3): a scale for every 64 by 64 weights, and for every 64 channels of a token",
        "FP8_BLOCK of compressed-tensors, with 64 in place of 128, which more widths are multiples of",
        {"weights": "e4m3-64x64", "quantizer": {"name": "rtn"}, "transforms": (), "inputs": "e4m3-g64-fp32"},
    ),
    "int4-fp8": Scheme(
        "4-bit weights in groups of 64, tokens in 8-bit floats (E4M3)",
        "W4AFP8 of compressed-tensors, in groups of 64 in place of 128",
        {"weights": "int4-g64", "quantizer": {"name": "gptq"}, "transforms": _SMOOTH, "inputs": "e4m3-row-fp32"},
    ),
    "mxfp8": Scheme(
        "MXFP8 on both sides: a power of two for every 32",
        "MXFP8 of compressed-tensors",
        {"weights": "mxfp8", "quantizer": {"name": "rtn"}, "transforms": (), "inputs": "mxfp8"},
    ),
    "mxfp6": Scheme(
        "MXFP6 on both sides: a power of two for every 32",
        "nobody's preset; MXFP6A8 of compressed-tensors has 8-bit inputs",
        {"weights": "mxfp6", "quantizer": {"name": "rtn"}, "transforms": _SMOOTH, "inputs": "mxfp6"},
    ),
    "nvfp4": Scheme(
        "NVFP4 on both sides: an E4M3 scale for every 16, under one for each weight and one for each input, chosen on calibration text",
        "NVFP4 of compressed-tensors",
        {
            "weights": "e2m1-g16-fp8over",
            "quantizer": {"name": "gptq"},
            "transforms": _SMOOTH,
            "inputs": {"format": "e2m1-g16-fp8over", "parameters": "local", "observer": {"name": "minmax"}},
        },
    ),
    "nvfp4a16": Scheme(
        "NVFP4 weights: an E4M3 scale for every 16, under one for each weight; inputs as they are",
        "NVFP4A16 of compressed-tensors",
        {"weights": "e2m1-g16-fp8over", "quantizer": {"name": "gptq"}, "transforms": (), "inputs": "keep"},
    ),
    "mxfp4": Scheme(
        "MXFP4 on both sides behind smoothing and rotations of blocks of 32",
        "MXFP4 of compressed-tensors, behind rotations",
        {
            "weights": "mxfp4",
            "quantizer": {"name": "gptq"},
            "transforms": (*_SMOOTH, {"name": "hadamard", "block": 32}),
            "inputs": "mxfp4",
        },
    ),
}


def scheme_keys(name: str) -> dict[str, Any]:
    """Return the keys of a recipe that a scheme sets. Raises UsageError."""
    known = next((scheme for scheme in SCHEMES if fold(scheme) == fold(name)), None)
    if known is None:
        raise unknown_name("scheme", name, SCHEMES, command="bitpress methods")
    return dict(SCHEMES[known].keys)
