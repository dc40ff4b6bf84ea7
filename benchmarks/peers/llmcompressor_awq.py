"""AWQ by llm-compressor, weights only, on given tokens; decoded weights, and the norms that took the scales.

    .peers/llmcompressor/bin/python benchmarks/peers/llmcompressor_awq.py \
        --model MODEL_DIR --tokens TOKENS.npy --bits 4 --out weights.safetensors

The package's own search (20 points, weights and activations both) and min-max scales with a zero point in groups of 64; every window is
used once and in order. It searches in float32 and is stored in bf16. Scales are folded into the norms and into the rows of up
projections, so the file holds those too. The package rounds when it saves: weights are here what its own compressor packs, unpacked
again, and bytes are those of what it packs.
"""

import argparse
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from checkpoint import fail, load_model
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor_gptq import load_tokens, packed
from safetensors.torch import save_file
from torch.utils.data import DataLoader


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="llm-compressor AWQ, weights only, dequantized output")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory with safetensors weights")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy array [samples, length]")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9), metavar="2..8")
    parser.add_argument("--group", type=int, default=64, help="input columns a scale covers")
    parser.add_argument("--samples", type=int, help="only the first of the windows: the search takes 20 passes over all")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file for the dequantized weights")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, object]:
    """Load, quantize, write the weights and return the report."""
    model = load_model(args.model, "float32")  # no less exact than in bf16, and faster where there are no tiles for that
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dataset = load_tokens(args.tokens, model.config.vocab_size)
    if args.samples is not None:
        dataset = dataset.select(range(args.samples))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears.pop("lm_head", None)
    if any(module.in_features % args.group for module in linears.values()):
        raise ValueError(f"--group {args.group} does not divide the input columns of every layer")
    norms = {name: value.detach().clone() for name, value in model.named_parameters() if "layernorm" in name}
    weights = QuantizationArgs(num_bits=args.bits, group_size=args.group, symmetric=False, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    if not torch.accelerator.is_available():  # this release pins memory for one that may not be there
        IntermediatesCache.pin_memory = lambda *_: None
    started, busy = time.monotonic(), time.process_time()
    oneshot(model=model, tokenizer=tokenizer, dataset=DataLoader(dataset, batch_size=1, shuffle=False), recipe=recipe)
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model.to(torch.bfloat16)  # as the checkpoint is: weights, their scales, norms
    load = round(os.getloadavg()[0], 2)
    if missed := [name for name, module in linears.items() if not hasattr(module, "quantization_scheme")]:
        raise ValueError(f"layers left unquantized: {missed}")
    nbytes, tensors = 0, {}
    for name, module in linears.items():
        tensors[f"{name}.weight"], size = packed(module)
        nbytes += size
    live = dict(model.named_parameters())
    tensors |= {name: live[name].detach() for name, value in norms.items() if not torch.equal(live[name], value)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, args.out)
    return {
        "tool": "llmcompressor",
        "version": version("llmcompressor"),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_rss_mb": round(peak, 1),
        "bytes": nbytes,
        "load": load,
        "threads": torch.get_num_threads(),
        "settings": {
            "method": "awq",
            "bits": args.bits,
            "group": args.group,
            "symmetric": False,
            "windows": len(dataset),
            "norms_changed": len(tensors) - len(linears),
            "dtype": str(model.dtype).removeprefix("torch."),
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
