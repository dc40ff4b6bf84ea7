"""Write tests/golden/*.safetensors: what other tools make of the same numbers.

Stand-alone: it runs in the environment of `benchmarks/peers/golden.txt` and imports nothing of bitpress. One file a tool; each tensor
is named `case/what`, and the metadata entry `about` says which tool, which version and which command. `--tool NAME` writes one.
"""

import argparse
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def gaussian(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Rows of rising size, from 2^-6 up: a scale is seldom a power of two, and blocks differ."""
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return w * 2.0 ** torch.arange(-6, rows - 6)[:, None]


def sweep(levels: np.ndarray) -> np.ndarray:
    """Zero and positive levels, the middles between them and their neighbors in float32, what overflows and what underflows."""
    positive = np.unique(np.abs(levels[np.isfinite(levels)])).astype(np.float32)
    middles = ((positive[1:].astype(np.float64) + positive[:-1]) / 2).astype(np.float32)
    top, step = positive[-1], positive[-1] - positive[-2]
    beyond = np.array([top + step * f for f in (0.25, 0.5, 0.75, 1, 2)] + [top * 2, top * 100], dtype=np.float32)
    beneath = np.array([positive[1] / 4, positive[1] / 1024], dtype=np.float32)
    up, down = np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))
    return np.concatenate([positive, middles, up, down, beyond, beneath]).astype(np.float32)


def ml_dtypes() -> Tensors:
    import ml_dtypes

    floats = ["float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"]
    floats += ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"]
    made: Tensors = {}
    for name in floats:
        dtype = np.dtype(getattr(ml_dtypes, name))
        levels = np.arange(1 << ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype).astype(np.float32)
        made[f"{name}/levels"] = torch.from_numpy(levels)
        if name.endswith("fnuz"):  # only what its codes mean
            continue
        inputs = sweep(levels)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = np.stack([inputs, -inputs]).astype(dtype)
        made[f"{name}/inputs"] = torch.from_numpy(inputs)
        made[f"{name}/codes"] = torch.from_numpy(rounded.view(np.uint8).copy())
    for name in ("int2", "int4", "uint2", "uint4"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        codes = np.arange(1 << int(name[-1]), dtype=np.uint8)
        made[f"{name}/levels"] = torch.from_numpy(codes.view(dtype).astype(np.float32))
    e8m0 = np.dtype(ml_dtypes.float8_e8m0fnu)
    made["float8_e8m0fnu/levels"] = torch.from_numpy(np.arange(255, dtype=np.uint8).view(e8m0).astype(np.float32))
    mantissas = [1, 1.25, 1.4, 1.41, math.sqrt(2), 1.4143, 1.42, 1.45, 1.4999, 1.5, 1.5001, 1.6, 1.75, 1.9, 1.9999]
    inputs = np.array([m * 2.0**e for e in (-120, -31, -8, -1, 0, 3, 40, 120) for m in mantissas], dtype=np.float32)
    made["float8_e8m0fnu/inputs"] = torch.from_numpy(inputs)
    made["float8_e8m0fnu/codes"] = torch.from_numpy(inputs.astype(e8m0).view(np.uint8).copy())
    return made


def gfloat() -> Tensors:
    """Every minifloat of 3 to 8 bits by a generic description: which codes are numbers depends on `specials`, the bias is free."""
    from gfloat import RoundMode, decode_float, encode_float, round_float
    from gfloat.formats import format_info_ocp_int8
    from gfloat.types import Domain, FormatInfo

    def describe(name: str, x: int, y: int, bias: int, specials: str) -> FormatInfo:
        nans = {"finite": 0, "fn": 1, "ieee": (1 << y) - 1}[specials]
        domain = Domain.Extended if specials == "ieee" else Domain.Finite
        kinds = {"is_signed": True, "has_nz": True, "has_subnormals": True, "is_twos_complement": False}
        return FormatInfo(name, 1 + x + y, y + 1, bias=bias, domain=domain, num_high_nans=nans, **kinds)

    ocp = {(4, 3): "fn", (5, 2): "ieee"}
    cases = [
        (f"e{x}m{n - 1 - x}", x, n - 1 - x, 2 ** (x - 1) - 1, ocp.get((x, n - 1 - x))) for n in range(3, 9) for x in range(1, n)
    ]
    cases += [(f"e{x}m{y}i", x, y, 2 ** (x - 1) - 1, "ieee") for x, y in ((4, 3), (3, 4), (2, 3), (3, 2), (2, 2), (3, 0))]
    cases += [
        ("e4m3b11", 4, 3, 11, "fn"),
        ("e2m1b0", 2, 1, 0, "finite"),
        ("e3m2b7", 3, 2, 7, "finite"),
        ("e5m2b20", 5, 2, 20, "ieee"),
    ]
    made: Tensors = {}
    for name, x, y, bias, specials in cases:
        info = describe(name, x, y, bias, specials or "finite")
        levels = np.array([decode_float(info, code).fval for code in range(1 << info.k)], dtype=np.float32)
        made[f"{name}/levels"] = torch.from_numpy(levels)
        if info.k <= 6:
            inputs = sweep(levels)
            signed = np.stack([inputs, -inputs]).tolist()
            codes = [[encode_float(info, round_float(info, v, RoundMode.TiesToEven, sat=True)) for v in row] for row in signed]
            made[f"{name}/inputs"] = torch.from_numpy(inputs)
            made[f"{name}/codes"] = torch.tensor(codes, dtype=torch.uint8)
    made["mxint8/levels"] = torch.tensor([decode_float(format_info_ocp_int8, code).fval for code in range(256)])
    return made


def torchao() -> Tensors:
    return torchao_mx() | torchao_nvfp4() | torchao_integers() | torchao_floats()


def torchao_mx() -> Tensors:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    kinds = {
        "mxfp8": torch.float8_e4m3fn,
        "mxfp8e5m2": torch.float8_e5m2,
        "mxfp6": DTYPE_FP6_E2M3,
        "mxfp6e3m2": DTYPE_FP6_E3M2,
        "mxfp4": torch.float4_e2m1fn_x2,
    }
    w = gaussian(6, 64, 1)
    w[0, :32] = 0
    w[1, 32:] = torch.linspace(-2, 2, 32)  # the largest is a power of two
    w[2, :32] = torch.arange(-16, 16) / 16 * 1.96875  # the largest magnitude lies beyond every largest level
    w[3, :32] = torch.arange(32) * 2.0**-4 * (-1.0) ** torch.arange(32)  # ties, and a negative zero
    w[3, 0] = -0.0
    w[4, :32] *= 2.0**-90
    made: Tensors = {"mx/w": w}
    for name, dtype in kinds.items():
        packed = MXTensor.to_mx(w, dtype, 32, ScaleCalculationMode.FLOOR)
        made[f"{name}/codes"] = packed.qdata.view(torch.uint8)
        made[f"{name}/scale"] = packed.scale.view(torch.uint8)
        made[f"{name}/decoded"] = packed.dequantize(torch.float32)
    return made


def torchao_nvfp4() -> Tensors:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    w = gaussian(6, 64, 2)
    made: Tensors = {}
    # 2688 is 6 * 448: with a largest magnitude of 2688 * 2^n the two-level scales come out the same in whatever order they are divided.
    dyadic = w.clone()
    dyadic[5] = dyadic[5].clamp(-2.625, 2.625)
    dyadic[5, 17] = 2.625
    for name, values in (("nvfp4", w), ("nvfp4_dyadic", dyadic)):
        per_tensor = per_tensor_amax_to_scale(values.abs().max())
        packed = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=per_tensor)
        made |= {
            f"{name}/w": values.contiguous(),
            f"{name}/codes": packed.qdata.view(torch.uint8),
            f"{name}/scale": packed.scale.view(torch.uint8),
            f"{name}/per_tensor": per_tensor.reshape(1),
            f"{name}/decoded": packed.dequantize(torch.float32),
        }
    return made


def torchao_integers() -> Tensors:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

    w = gaussian(4, 64, 3)
    w[1] = w[1].abs()
    made: Tensors = {"int/w": w}
    for bits in range(2, 9):
        half = 1 << (bits - 1)
        cases = (
            (f"int{bits}", MappingType.SYMMETRIC_NO_CLIPPING_ERR, torch.int8, -half, half - 1),
            (f"int{bits}-zero", MappingType.ASYMMETRIC, torch.uint8, 0, 2 * half - 1),
        )
        for name, mapping, dtype, low, high in cases:
            scale, zero = choose_qparams_affine(w, mapping, (1, 32), dtype, low, high, scale_dtype=torch.float32)
            codes = quantize_affine(w, (1, 32), scale, zero, dtype, low, high)
            made[f"{name}/scale"] = scale
            made[f"{name}/zero"] = zero.to(torch.int32)
            made[f"{name}/codes"] = codes
            made[f"{name}/decoded"] = dequantize_affine(
                codes, (1, 32), scale, zero, dtype, low, high, output_dtype=torch.float32
            )
    return made


def torchao_floats() -> Tensors:
    from torchao.quantization.quant_primitives import (
        _choose_qparams_affine_floatx,
        _dequantize_affine_floatx,
        _quantize_affine_floatx,
    )

    w = gaussian(4, 48, 4)
    made: Tensors = {"floatx/w": w}
    for x, y in ((2, 1), (2, 2), (3, 1), (2, 3), (3, 2), (4, 1)):
        scale = _choose_qparams_affine_floatx(w, x, y)
        codes = _quantize_affine_floatx(w, scale, x, y)
        made[f"e{x}m{y}/scale"] = scale
        made[f"e{x}m{y}/codes"] = codes
        made[f"e{x}m{y}/decoded"] = _dequantize_affine_floatx(codes, scale, x, y)
    return made


def bitsandbytes() -> Tensors:
    import bitsandbytes.functional as bnb

    w = gaussian(5, 384, 5)  # 30 blocks
    small = torch.randn(1, 64 * 300, generator=torch.Generator().manual_seed(6)) * 0.02
    w[4, :64] = 0
    made: Tensors = {"4bit/w": w, "dynamic/levels": bnb.create_dynamic_map()}
    for name in ("nf4", "fp4"):
        made[f"{name}/levels"] = bnb.get_4bit_type(name, device="cpu")
        codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name)
        made[f"{name}/codes"] = codes.reshape(w.shape[0], -1)
        made[f"{name}/absmax"] = state.absmax
        made[f"{name}/decoded"] = bnb.dequantize_4bit(codes, state)
    # Nested: the largest of 300 blocks, so that the second of the two blocks of scales is not full. The weight is not kept.
    _, plain = bnb.quantize_4bit(small, blocksize=64, quant_type="nf4")
    _, state = bnb.quantize_4bit(small, blocksize=64, quant_type="nf4", compress_statistics=True)
    made["nested/absmax"] = plain.absmax
    made["nested/codes"] = state.absmax
    made["nested/block"] = state.state2.absmax
    made["nested/offset"] = state.offset.reshape(1)
    made["nested/decoded"] = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return made


def compressed_tensors() -> Tensors:
    return packed_integers() | packed_floats()


def packed_integers() -> Tensors:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    made: Tensors = {}
    w = gaussian(16, 128, 7)  # 16 rows: version 0.20.0 cannot read back its zero points of 8 rows of 4 bits, which are one word
    w[6] = (torch.arange(128) % 60) * 0.125 - 3.875  # with zero points a scale of 1/2, and ties
    w[6, ::64], w[6, 1::64] = -4, 3.5
    w[7] = -w[6]  # and a zero point that is odd
    made["int/w"] = w
    for bits, group in ((4, 64), (4, 128), (8, 64), (8, 128), (3, 64), (2, 128)):
        for symmetric in (True, False):
            args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
            blocks = w.reshape(16, -1, group)
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
            packed = Compressor.compress(state, scheme)
            name = f"int{bits}-g{group}" + ("" if symmetric else "-zero")
            made[f"{name}/scale"] = scale
            made[f"{name}/packed"] = packed["weight_packed"]
            if not symmetric:
                made[f"{name}/zero"] = zero
                made[f"{name}/packed_zero"] = packed["weight_zero_point"]
            if (bits, group) == (4, 64):
                made[f"{name}/decoded"] = Compressor.decompress(packed, scheme)["weight"]
    return made


def packed_floats() -> Tensors:
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp6 import MXFP6PackedCompressor
    from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = gaussian(6, 64, 8)
    for row, largest in enumerate((1.95, 1.9, 1.8, 1.7)):  # the exponent of some of these is rounded up
        w[row, 7] = largest * 2.0 ** (row - 3)
    made: Tensors = {"float/w": w}
    kinds = {
        "nvfp4": (4, 16, "tensor_group", torch.float8_e4m3fn, NVFP4PackedCompressor),
        "mxfp4": (4, 32, "group", torch.uint8, MXFP4PackedCompressor),
        "mxfp6": (6, 32, "group", torch.uint8, MXFP6PackedCompressor),
        "mxfp8": (8, 32, "group", torch.uint8, MXFP8QuantizationCompressor),
    }
    for name, (bits, group, strategy, dtype, compressor) in kinds.items():
        args = QuantizationArgs(
            num_bits=bits, type="float", symmetric=True, strategy=strategy, group_size=group, scale_dtype=dtype
        )
        blocks = w.reshape(6, -1, group)
        shared = generate_gparam(w.amin(), w.amax()) if name == "nvfp4" else None
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=shared)
        state = {"weight": w, "weight_scale": scale}
        if shared is not None:
            state["weight_global_scale"] = made[f"{name}/global"] = shared
        packed = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        made[f"{name}/packed"] = packed["weight_packed" if "weight_packed" in packed else "weight"].view(torch.uint8)
        made[f"{name}/scale"] = packed["weight_scale"].view(torch.uint8)
        made[f"{name}/decoded"] = fake_quantize(w, scale, zero, args, global_scale=shared)
    return made


def gguf() -> Tensors:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import IQ4_NL, dequantize, quantize

    w = gaussian(2, 256, 9)
    w[0, :32] = 0
    w[1, :32] = torch.arange(32) * 2.0**-4 * (-1.0) ** torch.arange(32)  # ties
    made: Tensors = {"w": w, "IQ4_NL/levels": torch.tensor(IQ4_NL.kvalues, dtype=torch.float32)}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"):
        kind = GGMLQuantizationType[name]
        stored = quantize(w.numpy(), kind)
        made[f"{name}/bytes"] = torch.from_numpy(stored)
        made[f"{name}/decoded"] = torch.from_numpy(dequantize(stored, kind))
    # The package reads these but does not write them: random bytes, with float16 scales that are small and finite.
    generator = np.random.default_rng(10)
    halves = {
        "IQ4_NL": [0],
        "IQ4_XS": [0],
        "Q3_K": [108],
        "Q6_K": [208],
        "Q2_K": [80, 82],
        "Q4_K": [0, 2],
        "Q5_K": [0, 2],
        "NVFP4": [],
    }
    for name, places in halves.items():
        kind = GGMLQuantizationType[name]
        _, size = GGML_QUANT_SIZES[kind]
        stored = generator.integers(0, 256, (2, size), dtype=np.uint8)
        for place in places:
            scales = generator.uniform(-0.02, 0.02, (2, 1)).astype(np.float16)
            stored[:, place : place + 2] = scales.view(np.uint8)
        if name == "NVFP4":
            stored[:, :4] &= 0x7E  # a sign or 0x7F is no scale
        made[f"{name}/bytes"] = torch.from_numpy(stored)
        made[f"{name}/decoded"] = torch.from_numpy(dequantize(stored, kind))
    return made


TOOLS: dict[str, Callable[[], Tensors]] = {
    "ml_dtypes": ml_dtypes,
    "gfloat": gfloat,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "compressed_tensors": compressed_tensors,
    "gguf": gguf,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, action="append", help="only this one; may be given more than once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "golden")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for tool in args.tool or TOOLS:
        made = {name: t.detach().contiguous().clone() for name, t in TOOLS[tool]().items()}
        versions = {package: version(package) for package in (tool, "torch", "numpy")}
        about = {"tool": tool, "versions": versions, "command": f"python scripts/build_golden.py --tool {tool}"}
        path = args.out / f"{tool}.safetensors"
        # One entry of metadata: several would be written in no fixed order, and the file would differ from run to run.
        save_file(made, path, metadata={"about": json.dumps(about, sort_keys=True)})
        print(f"{path.name}: {len(made)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
