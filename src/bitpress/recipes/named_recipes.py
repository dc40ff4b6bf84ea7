"""Papers that are no part of a recipe but a whole one, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NAMED_RECIPES", "NamedRecipe"]


@dataclass(frozen=True)
class NamedRecipe:
    """A paper that is no part of a recipe but a recipe. `keys` are those that it sets."""

    summary: str
    paper: str
    source: str
    differs: str
    keys: Mapping[str, Any]


# The splits of 4 bits into exponent and mantissa.
_FP4 = ("e1m2", "e2m1", "e3m0")
_STATIC_INT8 = {"format": "int8-tensor", "parameters": "static", "observer": {"name": "minmax"}}


def _float_input(grid: str) -> dict[str, Any]:
    return {"format": f"{grid}-tensor", "parameters": "static", "observer": {"name": "output"}}


NAMED_RECIPES: dict[str, NamedRecipe] = {
    "moqe": NamedRecipe(
        summary="experts alone in few bits, rounded to nearest; everything else untouched",
        paper="P048",
        source='Kim et al. 2023, "Mixture of Quantized Experts (MoQE): Complementary Effect of Low-bit Quantization and Robustness"; '
        "only its abstract and a summary were seen: experts alone, 3 and 4 bits without training, 2 bits with it.",
        differs="3 bits with a scale for each output channel, nothing trained; other widths by --weights, for example int2-g64-zero.",
        keys={"weights": "int3-row", "quantizer": {"name": "rtn"}, "skip": ["*", "!*.experts.*"]},
    ),
    "qtip": NamedRecipe(
        summary="a path through a trellis for every column, with error feedback, after a random Hadamard rotation of both sides",
        paper="arXiv 2406.11235",
        source='Tseng et al. 2024, "QTIP: Quantization with Trellises and Incoherence Processing", and its public code (`lib/algo/ldlq.py`).',
        differs="2 bits; other widths by --weights, tcq1-row to tcq5-row by half bits. The trellis is described in formats/grids/trellis.py; "
        "channels are balanced before the rotation and every row has a scale, where the code has one scale for the whole weight. Nothing is "
        "fine-tuned afterwards.",
        keys={
            "weights": "tcq2-row",
            "transforms": [{"name": "balance"}, {"name": "hadamard", "outputs": True}],
            "quantizer": {"name": "ldlq"},
        },
    ),
    "resq": NamedRecipe(
        summary="4-bit weights and inputs, the principal eighth of every input in 8 bits, each eighth rotated for itself",
        paper="P272",
        source='Saxena et al. 2024, "ResQ: Mixed-Precision Quantization of Large Language Models with Low-Rank Residuals"; its abstract is what '
        "could be read.",
        differs="the principal subspace is that of two small matrices, online at every input (`klt`), where the paper folds a whole matrix into "
        "the network; weights have 4 bits in it too, and keys and values stay as they are.",
        keys={
            "weights": "int4-row",
            "transforms": [{"name": "klt", "parts": 8}],
            "quantizer": {"name": "gptq"},
            "inputs": {"format": "int4-row-fp32", "first": {"share": 0.125, "format": "int8-row-fp32"}},
        },
    ),
    "quarot": NamedRecipe(
        summary="4-bit weights and inputs in a rotated network, with online Hadamard rotations before down projections",
        paper="yardstick: QuaRot",
        source='Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", and its public code.',
        differs="the rotations R1, R2 and R4 of the field's layout; queries and keys (R3) and the cache stay as they are (`quarot-kv4` has them), and heads are not "
        "mixed with one another before the output projection. Down projections go by the name that they have in the Llama family; for another, write the recipe's override with its name.",
        keys={
            "weights": "int4-row",
            "transforms": [{"name": "rotate"}],
            "quantizer": {"name": "gptq"},
            "inputs": "int4-row-fp32",
            "overrides": [{"match": "*.down_proj", "transforms": [{"name": "hadamard"}]}],
        },
    ),
    "quarot-kv4": NamedRecipe(
        summary="quarot with keys and values in 4 bits too, queries and keys rotated behind rotary positions",
        paper="yardstick: QuaRot",
        source='Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", and its public code (`rotation_utils.py`).',
        differs="the rotations R1 to R4 of the field's layout. Keys and values have a scale and a zero point for every token and head, where "
        "the code has groups of 128 channels; they are rounded where attention multiplies them, and the cache that a runtime keeps is its own. "
        "The rest is as in quarot.",
        keys={
            "weights": "int4-row",
            "transforms": [{"name": "rotate"}, {"name": "qk-hadamard"}],
            "quantizer": {"name": "gptq"},
            "inputs": "int4-row-fp32",
            "keys": "int4-row-zero",
            "values": "int4-row-zero",
            "overrides": [{"match": "*.down_proj", "transforms": [{"name": "hadamard"}]}],
        },
    ),
    "zeroquant-fp": NamedRecipe(
        summary="FP4 weights whose scales in a row differ by powers of two, FP8 inputs, and a low-rank term for the error of the codes",
        paper="P002",
        source='Wu et al. 2023, "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats"; its abstract '
        "is what could be read.",
        differs="groups of 64; the constraint that all scales are powers of two is --weights e2m1-g64-e8m0. The low-rank term multiplies rounded "
        "inputs too.",
        keys={
            "weights": "e2m1-g64-p2row",
            "transforms": [],
            "quantizer": {"name": "gptq"},
            "corrections": [{"name": "lorc"}],
            "inputs": "e4m3-row-fp32",
        },
    ),
    "comet": NamedRecipe(
        summary="4-bit weights and inputs, the channels of outliers put in front and rounded to 8 bits",
        paper="P010",
        source='Liu et al. 2024, "COMET: Towards Practical W4A4KV4 LLMs Serving"; its abstract is what could be read: fine-grained mixed '
        "precision, most activations in 4 bits.",
        differs="one eighth of the channels of every input, the largest on the calibration text, has 8 bits; the cache stays as it is.",
        keys={
            "weights": "int4-row",
            "transforms": [{"name": "rearrange"}],
            "quantizer": {"name": "gptq"},
            "inputs": {"format": "int4-row-fp32", "first": {"share": 0.125, "format": "int8-row-fp32"}},
        },
    ),
    "outliertune": NamedRecipe(
        summary="6-bit weights and inputs, inputs with a static scale for every channel that weights take over",
        paper="P242",
        source='Wang et al. 2024, "OutlierTune: Efficient Channel-Wise Quantization for Large Language Models"; its abstract is what could be '
        "read: scales of channels go into the weights before the run, ranges are made symmetric.",
        differs="a channel's range is that of a sample, and its scale folds into the norm or the matrix before; where none takes it, all "
        "channels of an input share one scale. Weights are rounded to nearest.",
        keys={
            "weights": "int6-row",
            "transforms": [{"name": "shift"}, {"name": "smoothquant", "alpha": 1.0}],
            "quantizer": {"name": "rtn"},
            "inputs": {"format": "int6-tensor", "parameters": "static", "observer": {"name": "minmax"}},
        },
    ),
    "repquant": NamedRecipe(
        summary="6-bit weights and inputs, outputs of norms calibrated by channel, probabilities of attention in powers of the square root of 2",
        paper="P231",
        source='Li et al. 2024, "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale Reparameterization", '
        "its abstract, and the public code of its forerunner RepQ-ViT.",
        differs="ends of channels are searched, not learned, and gptq stands for the reconstruction of weights. Of the 7 bits of a probability one is "
        "a sign that it does not use. Other inputs than those of norms have one range of least squared error, as in the paper.",
        keys={
            "weights": "int6-row",
            "transforms": [{"name": "shift", "place": "folded", "ends": "clipped"}, {"name": "repquant-scale"}],
            "quantizer": {"name": "gptq"},
            "inputs": {"format": "int6-tensor-zero", "parameters": "static", "observer": {"name": "mse"}},
            "probabilities": {"format": "sqrtlog7-tensor", "parameters": "static", "observer": {"name": "mse"}},
        },
    ),
    "mptq-vit": NamedRecipe(
        summary="smoothing of shifted inputs at a strength found by search, static 6-bit inputs",
        paper="P384",
        source='Tai et al. 2024, "MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer"; its abstract is what could be '
        "read: smoothing with a bias term, and ratios of scales searched on data.",
        differs="the search is that of `aqas`, and ranges are those of least squared error; its greedy choice of bits is `budget`.",
        keys={
            "weights": "int6-row",
            "transforms": [{"name": "shift"}, {"name": "aqas"}],
            "quantizer": {"name": "rtn"},
            "inputs": {"format": "int6-tensor", "parameters": "static", "observer": {"name": "mse"}},
        },
    ),
    "llm-fp4": NamedRecipe(
        summary="4-bit floats on both sides, exponent bits chosen for every layer by the error of its output, channel scales in exponents",
        paper="P008",
        source='Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", its abstract and its public code (`quant_layers/fp_linear.py`).',
        differs="1, 2 or 3 exponent bits for weight and input, all nine pairs compared (`choose`). An input's clipping is that of least output error, a "
        "weight's that of least squared error. Products of attention stay as they are. Other widths: a recipe file with other formats.",
        keys={
            "weights": "e2m1-row",
            "transforms": [{"name": "llm-fp4-scale"}],
            "quantizer": {"name": "rtn", "clip": "mse"},
            "inputs": _float_input("e2m1"),
            "choose": {
                "by": {"name": "output-error"},
                "among": [{"weights": f"{w}-row", "inputs": _float_input(x)} for w in _FP4 for x in _FP4],
            },
        },
    ),
    "fptq": NamedRecipe(
        summary="4-bit weights in groups; inputs in 8 bits with static scales, equalized before, or with scales for every token, by their range",
        paper="P275",
        source='Li et al. 2023, "FPTQ: Fine-grained Post-Training Quantization for Large Language Models": its abstract, its formula as llm-compressor has '
        "it, and a summary (papers.lunadong.com/paper/14731) of its choice by layer.",
        differs="groups of 64; the limits of the ranges, 15 and 150, are this project's. An input in the middle that no earlier layer can divide has static "
        "scales and is not equalized.",
        keys={
            "weights": "int4-g64",
            "transforms": [{"name": "fptq-smooth"}],
            "quantizer": {"name": "rtn", "clip": "mse"},
            "inputs": _STATIC_INT8,
            "choose": {
                "by": {"name": "range", "edges": [15.0, 150.0]},
                "among": [
                    {"inputs": _STATIC_INT8, "scales": False},
                    {"inputs": _STATIC_INT8},
                    {"inputs": {"format": "int8-row-fp32"}, "scales": False},
                ],
            },
        },
    ),
    "abq-llm": NamedRecipe(
        summary="weights of five levels from -2 to 2 behind smoothing, 8-bit tokens",
        paper="P339",
        source='Zeng et al. 2024, "ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models": its abstract, and its public code '
        "(`algorithm/quantize/quantizer.py`, `abq_llm.py`).",
        differs="groups of 64. Its distribution correction begins with the factors of SmoothQuant, which are all of it here: learning them, clipping and the "
        "compensation vectors of some down projections (which begin at 0) against attention maps and outputs of blocks is left out. The levels are "
        "symmetric, where the code also has a zero point; stored in 3 bits.",
        keys={
            "weights": "balanced2-g64",
            "transforms": [{"name": "smoothquant"}],
            "quantizer": {"name": "rtn", "clip": "mse"},
            "inputs": {"format": "int8-row-fp32"},
        },
    ),
}
