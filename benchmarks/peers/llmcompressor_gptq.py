"""Quantize a Llama-family checkpoint with llm-compressor's GPTQ and write the dequantized weights.

Stand-alone: it runs in the environment of ``llmcompressor.txt`` and imports nothing of bitpress. The package's own
defaults are kept (dampening, block size, observer, sequential pipeline, one sample a batch), but every sample is used
once and in order: the package would shuffle them. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from checkpoint import fail, load_model
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors.torch import save_file
from torch.utils.data import DataLoader


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="llm-compressor GPTQ, weights only, dequantized output")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory with safetensors weights")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy array [samples, length]")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9), metavar="2..8")
    parser.add_argument("--group", type=int, default=64, help="input columns a scale covers")
    parser.add_argument("--symmetric", action="store_true", help="no zero point (default: asymmetric)")
    parser.add_argument("--actorder", choices=["static", "none"], help="default: the package's own")
    parser.add_argument("--dtype", choices=["auto", "float32"], default="auto", help="auto: as the checkpoint is saved")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file for the dequantized weights")
    return parser.parse_args()


def load_tokens(path: Path, vocabulary: int) -> Dataset:
    """Read the calibration tokens as a dataset that needs no tokenizer."""
    tokens = np.load(path, allow_pickle=False)
    if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype != np.int64:
        raise ValueError(f"{path}: expected int64 [samples, length], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"{path}: token ids outside 0..{vocabulary - 1}")
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}).with_format("torch")


def dequantized(name: str, module: torch.nn.Linear, bits: int, group: int) -> torch.Tensor:
    """Return (code - zero) * scale in float32, after checking that it is the weight that the package left."""
    left = module.weight.detach().float().reshape(module.out_features, -1, group)
    scale = module.get_parameter("weight_scale").detach().float().unsqueeze(-1)
    zero = module.get_parameter("weight_zero_point").detach().float().unsqueeze(-1)
    codes = torch.round(left / scale + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = (codes - zero) * scale
    if not torch.equal(weight.flatten(1).to(module.weight.dtype), module.weight):
        raise ValueError(f"{name}: the weight is not on its quantization grid")
    distinct = 1 + int((weight.sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1).max())
    if distinct > 2**bits:
        raise ValueError(f"{name}: a group has {distinct} distinct values, more than {2**bits}")
    return weight.flatten(1).contiguous()


def packed(module: torch.nn.Linear) -> tuple[torch.Tensor, int]:
    """Return a weight as the package decodes what it stores, and the bytes of that."""
    scheme = vars(module)["quantization_scheme"]
    stored = PackedQuantizationCompressor.compress(
        {name: value.detach() for name, value in module.state_dict().items()}, scheme
    )
    return PackedQuantizationCompressor.decompress(stored, scheme)["weight"], sum(value.nbytes for value in stored.values())


def run(args: argparse.Namespace) -> dict[str, object]:
    """Load, quantize, write the weights and return the report."""
    if not args.out.parent.is_dir():
        raise ValueError(f"{args.out}: no such folder")
    if args.bits == 8 and args.dtype != "float32":
        raise ValueError("--bits 8 needs --dtype float32: bfloat16 weights cannot tell its codes apart")
    warnings: list[str] = []
    logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    started = time.monotonic()
    model = load_model(args.model, args.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dataset = load_tokens(args.tokens, model.config.vocab_size)
    load_seconds = time.monotonic() - started

    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears.pop("lm_head", None)
    if args.group < 1 or any(module.in_features % args.group for module in linears.values()):
        raise ValueError(f"--group {args.group} does not divide the input columns of every layer")
    weights = QuantizationArgs(num_bits=args.bits, group_size=args.group, symmetric=args.symmetric, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    order = {} if args.actorder is None else {"actorder": None if args.actorder == "none" else args.actorder}
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **order)
    started, busy = time.monotonic(), time.process_time()
    oneshot(model=model, tokenizer=tokenizer, dataset=DataLoader(dataset, batch_size=1, shuffle=False), recipe=recipe)
    seconds, busy = time.monotonic() - started, time.process_time() - busy

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    load = round(os.getloadavg()[0], 2)
    if missed := [name for name, module in linears.items() if not hasattr(module, "quantization_scheme")]:
        raise ValueError(f"layers left unquantized: {missed}")
    save_file({f"{n}.weight": dequantized(n, m, args.bits, args.group) for n, m in linears.items()}, args.out)
    used = {vars(module)["quantization_scheme"].weights.actorder for module in linears.values()}
    return {
        "tool": "llmcompressor-gptq",
        "version": version("llmcompressor"),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(busy, 2),
        "load_seconds": round(load_seconds, 3),
        "peak_rss_mb": round(peak, 1),
        "bytes": sum(packed(module)[1] for module in linears.values()),
        "load": load,
        "layers": len(linears),
        "bits": args.bits,
        "group": args.group,
        "symmetric": args.symmetric,
        "actorder": "/".join(sorted(ActivationOrdering(value).value if value else "none" for value in used)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rtn_fallback": any("Hessian inversion failed" in line for line in warnings),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    try:
        report = run(parse_args())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise fail(error) from None
    print(json.dumps(report), flush=True)
