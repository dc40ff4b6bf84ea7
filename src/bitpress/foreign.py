"""Names of formats and methods in other tools, and the nearest ones here.

Names are compared in lower case, with `_` for `-` and spaces. Numbers captured by a pattern fill the `{}` of `weights` in order.
The first row that matches counts.
"""

import re
from dataclasses import dataclass

__all__ = ["FOREIGN", "Foreign", "find_foreign", "foreign_hint"]


@dataclass(frozen=True)
class Foreign:
    """Names of another tool. `quantizer` is None if any will do; `examples` are names that the pattern must match."""

    pattern: str
    tool: str
    weights: str
    quantizer: str | None
    why: str
    examples: tuple[str, ...]


_DEFAULT = "integers with a scale and a zero point for every 64"
_SYMMETRIC = "integers with a scale for every"
_ROWS = "8-bit integers with a scale for every row"
_INPUTS = "--inputs int8-row-fp32 rounds inputs too"


def _scheme(name: str) -> str:
    """Point to a scheme, for a name that says how inputs are rounded."""
    return f"--scheme {name} rounds inputs too"


FOREIGN: tuple[Foreign, ...] = (
    # llama.cpp: its types have their own names here (`SHORT` of `formats.table`); these are its mixes and other types
    Foreign(r"q([458])_0_[48]_[48]", "llama.cpp", "q{}_0", None, "the same, in another order of bytes", ("Q4_0_4_4",)),
    Foreign(r"q8_k(?:_\w+)?|q8_1", "llama.cpp", "q8_0", None, f"{_SYMMETRIC} 32", ("Q8_K", "Q8_K_XL")),
    Foreign(
        r"(?:ud_)?q([23456])_k_\w+",
        "llama.cpp",
        "q{}_k",
        None,
        "the type of most of its weights",
        ("q4_k_m", "Q4_K_S", "Q3_K_L", "UD-Q4_K_XL"),
    ),
    Foreign(r"(?:ud_)?iq3_\w+", "llama.cpp", "q3_k", None, "3 bits with scales in two levels", ("IQ3_XXS", "iq3_m")),
    Foreign(r"(?:ud_)?iq2_\w+", "llama.cpp", "e8p-row", "quip_sharp", "2 bits by the E8 lattice", ("IQ2_XXS", "iq2_m")),
    Foreign(r"(?:ud_)?iq1_\w+", "llama.cpp", "ternary-g64", None, "three levels", ("IQ1_S",)),
    # Plain types
    Foreign(
        r"q0b?f(?:16|32)|b?f(?:p|loat)?_?(?:16|32)|16_?bits?",
        "a name of uncompressed weights",
        "dfloat11",
        None,
        "bfloat16 weights bit for bit in about 10.75 bits",
        ("f16", "BF16", "float16", "bfloat16", "q0f16"),
    ),
    # compressed-tensors, vLLM
    Foreign(r"w([2-8])a16_?g([1-9]\d*)", "vLLM", "int{}-g{}", None, "the same integers and groups", ("W4A16-G64",)),
    Foreign(r"w([2-8])a16_asym", "vLLM", "int{}-g128-zero", None, "the same integers and groups", ("W4A16_ASYM",)),
    Foreign(
        r"(?:w4a(?:16|8)|int4)_(?:auto)?awq", "TensorRT-LLM", "int4-g128-zero", "awq", "the same", ("int4_awq", "W4A16_AWQ")
    ),
    Foreign(r"w8a16", "vLLM", "int8-row", None, _ROWS, ("W8A16",)),
    Foreign(
        r"w8a8(?:_?int8)?|int_?w8a8", "vLLM", "int8-row", None, f"{_ROWS}; {_scheme('w8a8')}", ("W8A8", "w8a8_int8", "int_w8a8")
    ),
    Foreign(r"w(4)a8", "vLLM", "int{}-g128", None, f"{_SYMMETRIC} 128; {_scheme('w4a8')}", ("W4A8",)),
    Foreign(r"w(4)a4", "vLLM", "int{}-row", None, f"{_SYMMETRIC} row; {_scheme('w4a4')}", ("W4A4",)),
    Foreign(r"w(6)a6", "OmniQuant", "int{}-row", None, f"{_SYMMETRIC} row; {_scheme('w6a6')}", ("W6A6",)),
    Foreign(r"w([2-7])a16", "vLLM", "int{}-g128", None, f"{_SYMMETRIC} 128", ("W4A16", "W3A16")),
    Foreign(r"w([2-7])a[48]", "vLLM", "int{}-g128", None, f"{_SYMMETRIC} 128; {_INPUTS}", ("W3A8", "W6A8")),
    Foreign(
        r"fp8_?e5m2|f(?:loat)?8_e5m2\w*", "vLLM", "e5m2-row", None, "8-bit floats with a scale for every row", ("fp8_e5m2",)
    ),
    Foreign(
        r"(?:w8a(?:8|16)_|fbgemm_|modelopt_)?(?:fp|f|float)8(?:wo|dq|_\w+)?|e4m3_\w+",
        "vLLM",
        "e4m3-row",
        None,
        f"8-bit floats with a scale for every row; {_scheme('fp8')}",
        ("fp8", "FP8_DYNAMIC", "float8wo", "fbgemm_fp8", "W8A8-FP8", "fp8_e4m3"),
    ),
    Foreign(
        r"(?:modelopt_)?nvfp4\w*",
        "vLLM",
        "nvfp4",
        None,
        f"the same; {_scheme('nvfp4')}",
        ("nvfp4", "NVFP4A16", "modelopt_nvfp4"),
    ),
    Foreign(
        r"(?:modelopt_)?mxfp4\w*", "vLLM", "mxfp4", None, f"the same; {_scheme('mxfp4')}", ("mxfp4", "MXFP4A16", "mxfp4_moe")
    ),
    Foreign(r"mxfp([68])\w+", "vLLM", "mxfp{}", None, f"the same; {_scheme('mxfp8')}", ("MXFP8A16", "mxfp6_e2m3")),
    # bitsandbytes
    Foreign(r"(?:bnb_|bitsandbytes_)?fp4(?:_\w+)?", "bitsandbytes", "fp4bnb-g64", "rtn", "the same levels", ("fp4", "bnb-fp4")),
    Foreign(
        r"(?:bnb_?|bitsandbytes_?)(?:nf4|4_?bits?)?|nf4(?:_\w+)?|(?:load_in_)4_?bits?|qlora",
        "bitsandbytes",
        "nf4-g64",
        "rtn",
        "the same levels and blocks",
        ("nf4", "bnb-4bit", "bnb_nf4", "load_in_4bit", "bitsandbytes"),
    ),
    Foreign(
        r"(?:bnb_?|bitsandbytes_?)(?:int)?8_?(?:bits?)?|load_in_8_?bits?|llm_?\.?int8",
        "bitsandbytes",
        "int8-row",
        "rtn",
        _ROWS,
        ("bnb-8bit", "load_in_8bit", "llm.int8"),
    ),
    # torchao
    Foreign(r"int4_?(?:wo|weight_only)_?(\d+)", "torchao", "int4-g{}-zero", "rtn", "the same groups", ("int4wo-64",)),
    Foreign(r"int4_?(?:wo|weight_only)", "torchao", "int4-g128-zero", "rtn", "the same groups", ("int4wo", "int4_weight_only")),
    Foreign(r"8da4w|int8da_?int4w\w*", "torchao", "int4-g32", "rtn", f"the same groups; {_INPUTS}", ("8da4w", "int8da_int4w")),
    Foreign(
        r"int8_?(?:wo|weight_only)|eetq|quanto(?:_int8)?",
        "torchao",
        "int8-row",
        "rtn",
        _ROWS,
        ("int8wo", "int8_weight_only", "eetq"),
    ),
    Foreign(
        r"int8_?(?:dq|dynamic\w*)",
        "torchao",
        "int8-row",
        "rtn",
        f"{_ROWS}; {_scheme('w8a8')}",
        ("int8dq", "int8_dynamic_activation_int8_weight"),
    ),
    Foreign(r"uint([2-7])(?:_?wo)?", "torchao", "int{}-g64-zero", None, _DEFAULT, ("uint4", "uint3wo")),
    Foreign(
        r"fp6(?:_llm)?|fpx|quant_llm|deepspeedfp",
        "torchao",
        "e3m2-row",
        None,
        "the 6-bit float of FP6-LLM",
        ("fp6", "quant_llm"),
    ),
    # MLC, MLX, OpenVINO
    Foreign(r"q4f16_(?:auto)?awq", "MLC", "int4-g128-zero", "awq", "the same", ("q4f16_autoawq",)),
    Foreign(r"q([348])b?f(?:16|32)(?:_\d)?", "MLC", "int{}-g32", None, f"{_SYMMETRIC} 32", ("q4f16_1", "q3f16_0", "q4bf16_1")),
    Foreign(r"(?:mlx_?)([2-8])_?bits?", "MLX", "int{}-g64-zero", None, "the same groups", ("mlx-4bit",)),
    Foreign(r"int4_sym", "OpenVINO", "int4-g128", None, f"{_SYMMETRIC} 128", ("int4_sym",)),
    Foreign(r"int4_asym", "OpenVINO", "int4-g128-zero", None, "a scale and a zero point for every 128", ("int4_asym",)),
    # Methods whose name stands for a format elsewhere
    Foreign(
        r"(?:auto_?)?awq(?:_\w+)?|gemm",
        "AutoAWQ",
        "int4-g128-zero",
        "awq",
        "its usual groups",
        ("awq", "AutoAWQ", "awq_marlin"),
    ),
    Foreign(
        r"(?:auto_?)?gptq(?:model|_\w+|_?int[2-8])?|marlin",
        "GPTQModel",
        "int4-g128",
        "gptq",
        "its usual groups",
        ("gptq", "auto_gptq", "gptqmodel", "GPTQ-Int4", "gptq_marlin"),
    ),
    Foreign(
        r"auto_?round(?:_best|_light)?",
        "AutoRound",
        "int4-g128",
        "gptq",
        "and --tune signround to learn roundings",
        ("AutoRound",),
    ),
    Foreign(
        r"omni_?quant", "OmniQuant", "int4-g128-zero", "rtn", "and --tune learned-clipping to learn ranges", ("OmniQuant",)
    ),
    Foreign(
        r"efficient_?qat|block_?ap",
        "EfficientQAT",
        "int2-g64-zero",
        "gptq",
        "and --tune block-ap to learn blocks",
        ("EfficientQAT",),
    ),
    Foreign(r"brecq", "a name of block reconstruction", "int4-g128-zero", "gptq", "and --tune adaround", ("BRECQ",)),
    Foreign(r"hqq(?:_?([2-8])_?bits?)", "HQQ", "int{}-g64-zero", "hqq", "the same", ("hqq_4bit",)),
    Foreign(r"hqq", "HQQ", "int4-g64-zero", "hqq", "its usual bits", ("hqq",)),
    Foreign(r"spqr", "SpQR", "int3-g16-zero", "spqr", "its usual groups", ("spqr",)),
    Foreign(r"squeeze_?llm", "SqueezeLLM", "kmeans4-row", "squeezellm", "the same levels", ("SqueezeLLM",)),
    Foreign(r"quip(?:#|_sharp)?", "QuIP#", "e8p-row", "quip_sharp", "the same codebook", ("quip#", "QuIP")),
    Foreign(r"aqlm|vptq", "AQLM", "aq2x8x8-row", "aqlm", "learned vectors, 2 bits", ("aqlm", "vptq")),
    Foreign(r"higgs", "HIGGS", "gauss8x2-row", "higgs", "the same points", ("higgs",)),
    Foreign(
        r"exl2|flatquant|ostquant",
        "a method with a change of basis or learned rounding",
        "int4-g64-zero",
        "ldlq",
        "rotated weights; --bits 4 takes the recipe that measured best",
        ("exl2", "FlatQuant"),
    ),
    Foreign(
        r"qtip|exl3", "a method of trellises", "tcq2-row", "ldlq", "--recipe qtip is the whole of it, rotated", ("QTIP", "EXL3")
    ),
    Foreign(
        r"quarot|spinquant",
        "a method of rotated networks",
        "int4-row",
        "gptq",
        "--recipe quarot rotates the network and rounds inputs too",
        ("QuaRot", "SpinQuant"),
    ),
    Foreign(
        r"smooth_?quant|sq8?",
        "SmoothQuant",
        "int8-row",
        None,
        f"{_ROWS}; --scheme w8a8 has its transform, smoothquant, and rounds inputs",
        ("SmoothQuant",),
    ),
    Foreign(r"fptq", "FPTQ", "int4-g64", None, "--recipe fptq is the whole of it", ("FPTQ",)),
    Foreign(r"llm_?fp4", "LLM-FP4", "e2m1-row", "rtn", "--recipe llm-fp4 chooses exponent bits", ("LLM-FP4",)),
    Foreign(r"abq(?:_?llm)?", "ABQ-LLM", "balanced2-g64", None, "--recipe abq-llm smooths and rounds inputs too", ("ABQ-LLM",)),
    Foreign(r"i_?matrix", "llama.cpp", "int4-g32-zero", "gptq", "it weighs errors by the layer's inputs", ("imatrix",)),
    # Bits alone
    Foreign(
        r"b?1[._]58(?:_?(?:bits?|bpw))?|bitnet(?:_\w+)?",
        "BitNet",
        "ternary-row",
        "bitnet_ptq",
        "three levels",
        ("1.58bit", "b1.58", "bitnet"),
    ),
    Foreign(r"1_?bits?|(?:1(?:\.\d+)?)_?bpw", "a number of bits", "binary-row", "ptq161", "signs", ("1bit", "1.6bpw")),
    Foreign(
        r"([2-8])_?bits?_?g?([1-9]\d+)g?|w([2-8])_?g([1-9]\d+)|q([2-8])_?g([1-9]\d+)",
        "bits and groups",
        "int{}-g{}-zero",
        None,
        "a scale and a zero point for every group",
        ("4bit-128g", "w4g128", "3bit-g64"),
    ),
    Foreign(
        r"(?:int|q|w)?_?([2-8])(?:\.\d+)?_?(?:bits?|bpw|b)?(?:_h\d)?",
        "a number of bits",
        "int{}-g64-zero",
        None,
        _DEFAULT,
        ("4bit", "4-bit", "4.0bpw", "3.5bpw", "q4", "w4", "int4", "8"),
    ),
)


def find_foreign(name: str) -> tuple[Foreign, str] | None:
    """Return the row that a name of another tool belongs to, and the format that comes nearest."""
    text = name.strip().casefold().replace("-", "_").replace(" ", "_")
    for row in FOREIGN:
        found = re.fullmatch(row.pattern, text, re.ASCII)
        if found is not None:
            return row, row.weights.format(*(group for group in found.groups() if group is not None))
    return None


def foreign_hint(name: str) -> str | None:
    """Say what comes nearest here to a name of another tool; None for a name that belongs to none."""
    found = find_foreign(name)
    if found is None:
        return None
    row, weights = found
    by = "" if row.quantizer is None else f" with quantizer {row.quantizer}"
    return (
        f"That is {row.tool if ' ' in row.tool else f'a name of {row.tool}'}; nearest here: weights {weights}{by} ({row.why})."
    )
