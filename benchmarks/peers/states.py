"""What a peer's model with rounded inputs gives: the states behind its last block, for texts of the bench.

Stand-alone like the scripts that use it: nothing of bitpress is imported.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoint import fail, load_model
from safetensors.torch import save_file

BATCH = 4


def parse_args(tool: str, schemes: list[str]) -> argparse.Namespace:
    """Read the command line, which is the same for every tool."""
    parser = argparse.ArgumentParser(description=f"{tool}: weights and inputs of linears rounded, states of texts")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory with safetensors weights")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy array [samples, length], to calibrate on")
    parser.add_argument(
        "--texts", type=Path, required=True, help=".npz of int64 arrays [samples, length], by the names of texts"
    )
    parser.add_argument("--scheme", choices=schemes, required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file for the states behind the last block")
    return parser.parse_args()


@torch.no_grad()
def states_of(model: torch.nn.Module, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return what the last block gives, [samples, length, hidden], in float32."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).float())

    inner: Any = model
    hook = inner.model.layers[-1].register_forward_hook(keep)
    for batch in torch.from_numpy(tokens).split(BATCH):
        inner.model(input_ids=batch, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def run(args: argparse.Namespace, quantize: Callable[[Any, torch.Tensor], Any], tool: str) -> dict[str, object]:
    """Load, quantize, write the states, and return the report. `quantize` takes model and tokens, and returns the model."""
    model = load_model(args.model, "float32")
    tokens = torch.from_numpy(np.load(args.tokens, allow_pickle=False))
    started, busy = time.monotonic(), time.process_time()
    model = quantize(model, tokens)
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    with np.load(args.texts, allow_pickle=False) as texts:
        save_file({name: states_of(model, texts[name]).contiguous() for name in texts}, args.out)
    return {
        "tool": tool,
        "version": version(tool),
        "scheme": args.scheme,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def told(work: Callable[[], dict[str, object]]) -> None:
    """Print the report as one line of JSON, or the error as one line."""
    try:
        report = work()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise fail(error) from None
    print(json.dumps(report), flush=True)
