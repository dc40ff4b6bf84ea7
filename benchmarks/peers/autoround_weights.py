"""AutoRound by its own package, weights only, on given tokens: 200 steps of signed gradient descent a block on rounding and clipping.

    .peers/llmcompressor/bin/python benchmarks/peers/autoround_weights.py \
        --model MODEL_DIR --tokens TOKENS.npy --bits 4 --out weights.safetensors

The package's defaults (8 windows a step) with a zero point and groups of 64. It leaves its weights rounded in the checkpoint's type,
with scales in float16 beside; the file holds (code - zero point) * scale in float32, each checked to lie within the rounding of those
two types of the weight that the package left. Bytes are those of what its own format "auto_round" packs: codes, scales, zero points.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from auto_round import AutoRound
from checkpoint import fail, load_model
from safetensors import safe_open
from safetensors.torch import save_file


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="AutoRound, weights only, dequantized output")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory with safetensors weights")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy array [samples, length]")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9), metavar="2..8")
    parser.add_argument("--group", type=int, default=64, help="input columns a scale covers")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--samples", type=int, help="only this many windows, to try things out")
    parser.add_argument(
        "--compute", choices=("bf16", "fp32"), default="bf16", help="the package takes bf16; fp32 is faster without AMX"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file for the dequantized weights")
    return parser.parse_args()


def dequantized(name: str, module: torch.nn.Linear, bits: int, group: int) -> torch.Tensor:
    """Return (code - zero) * scale in float32, after checking that it is the weight that the package left."""
    left = module.weight.detach().float().reshape(module.out_features, -1, group)
    scale = torch.as_tensor(vars(module)["scale"]).float().reshape(*left.shape[:2], 1)
    zero = torch.as_tensor(vars(module)["zp"]).float().reshape(*left.shape[:2], 1)
    codes = torch.round(left / scale + zero).clamp(0, 2**bits - 1)
    weight = (codes - zero) * scale
    if not torch.allclose(weight, left, rtol=2**-7, atol=1e-6):
        raise ValueError(f"{name}: the weight is not on its quantization grid")
    return weight.flatten(1).contiguous()


def stored_bytes(folder: Path) -> int:
    """Sum what the package's own format stores for linears."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if "_proj." in name]  # noqa: SIM118 (a file of tensors is no dict)
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


def run(args: argparse.Namespace) -> dict[str, object]:
    """Load, quantize, write the weights and return the report."""
    model = load_model(args.model, "auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokens = torch.from_numpy(np.load(args.tokens, allow_pickle=False))[: args.samples]
    scheme = {"bits": args.bits, "group_size": args.group, "sym": False, "data_type": "int", "act_bits": 16}
    started, busy = time.monotonic(), time.process_time()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        iters=args.iterations,
        seqlen=tokens.shape[1],
        nsamples=tokens.shape[0],
        batch_size=8,
        dataset=list(tokens.split(8)),
        device_map="cpu",
        amp=args.compute == "bf16",
    )
    model, _ = rounder.quantize()
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    load = round(os.getloadavg()[0], 2)
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    save_file({f"{n}.weight": dequantized(n, m, args.bits, args.group) for n, m in linears.items()}, args.out)
    with tempfile.TemporaryDirectory() as folder:
        rounder.save_quantized(folder, format="auto_round:auto_gptq", inplace=True)
        nbytes = stored_bytes(Path(folder))
    return {
        "tool": "auto-round",
        "version": version("auto-round"),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_rss_mb": round(peak, 1),
        "bytes": nbytes,
        "load": load,
        "threads": torch.get_num_threads(),
        "settings": {
            "bits": args.bits,
            "group": args.group,
            "symmetric": False,
            "iterations": args.iterations,
            "batch": 8,
            "compute": args.compute,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    try:
        report = run(parse_args())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise fail(error) from None
    print(json.dumps(report), flush=True)
