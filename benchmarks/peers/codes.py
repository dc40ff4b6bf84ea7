"""The peers' part of `benchmarks/codes.py`, in their own environment: one JSON line for every tool, format and action."""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch


def report(tool: str, name: str, action: str, call: Callable[[], Any], w: torch.Tensor, repeats: int) -> None:
    call()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        rates.append(w.numel() / (time.perf_counter() - start) / 1e6)
    rates.sort()
    row = {"tool": f"{tool} {version(tool)}", "format": name, "action": action, "shape": list(w.shape)}
    times = {"median": rates[len(rates) // 2], "p10": rates[len(rates) // 10], "p90": rates[-1 - len(rates) // 10]}
    print(json.dumps(row | times), flush=True)


def torchao(w: torch.Tensor, repeats: int) -> None:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block = (1, 64)

    def fit() -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = choose_qparams_affine(w, MappingType.ASYMMETRIC, block, torch.uint8, 0, 15)
        return found

    scale, zero = fit()
    codes = quantize_affine(w, block, scale, zero, torch.uint8, 0, 15)
    report("torchao", "int4-g64-zero", "fit", fit, w, repeats)
    report("torchao", "int4-g64-zero", "encode", lambda: quantize_affine(w, block, scale, zero, torch.uint8, 0, 15), w, repeats)
    report(
        "torchao",
        "int4-g64-zero",
        "decode",
        lambda: dequantize_affine(codes, block, scale, zero, torch.uint8, 0, 15),
        w,
        repeats,
    )


def bitsandbytes(w: torch.Tensor, repeats: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for kind in ("nf4", "fp4"):
        packed, state = quantize_4bit(w, blocksize=64, quant_type=kind)
        name = "nf4-g64" if kind == "nf4" else "fp4bnb-g64"
        report("bitsandbytes", name, "fit+encode+pack", lambda k=kind: quantize_4bit(w, blocksize=64, quant_type=k), w, repeats)
        report("bitsandbytes", name, "unpack+decode", lambda p=packed, s=state: dequantize_4bit(p, s), w, repeats)


def hqq(w: torch.Tensor, repeats: int) -> None:
    from hqq.core.bitpack import BitPack
    from hqq.core.quantize import Quantizer

    def press() -> Any:
        return Quantizer.quantize(w, nbits=4, group_size=64, axis=1, optimize=False, device="cpu", compute_dtype=torch.float32)

    packed, meta = press()
    codes = torch.randint(0, 16, w.shape, dtype=torch.uint8)
    bytes4 = BitPack.pack_4bit_u8(codes)
    report("hqq", "int4-g64-zero", "fit+encode+pack", press, w, repeats)
    report("hqq", "int4-g64-zero", "unpack+decode", lambda: Quantizer.dequantize(packed, meta), w, repeats)
    report("hqq", "int4-g64-zero", "pack", lambda: BitPack.pack_4bit_u8(codes), w, repeats)
    report("hqq", "int4-g64-zero", "unpack", lambda: BitPack.unpack_4bit_u8(bytes4), w, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    w = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for peer in (torchao, bitsandbytes, hqq):
            peer(w, options.repeats)


if __name__ == "__main__":
    main()
