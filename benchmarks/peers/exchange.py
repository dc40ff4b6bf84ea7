"""What a peer's script takes and gives, apart from the peer: linears out of a checkpoint, decoded weights, one JSON line of facts.

Stand-alone: it runs in every peer's environment and imports nothing of bitpress.
"""

import argparse
import json
import os
import resource
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def parser(description: str) -> argparse.ArgumentParser:
    """Return what every script is told; scripts that read no text ignore the tokens."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", type=Path, required=True, help="Hugging Face directory with safetensors weights")
    made.add_argument("--tokens", type=Path, help="int64 .npy array [samples, length]")
    made.add_argument("--out", type=Path, required=True, help="safetensors file for the dequantized weights")
    made.add_argument("--blocks", type=int, help="only this many first blocks, to try things out")
    return made


def read_linears(model: Path, blocks: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and weight, as stored, of every linear of the blocks."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file of tensors is no dict)
                if name.endswith("_proj.weight") and (blocks is None or int(name.split(".")[2]) < blocks):
                    yield name, file.get_tensor(name)


def finish(
    out: Path,
    weights: Mapping[str, torch.Tensor],
    package: str,
    nbytes: int,
    seconds: tuple[float, float],
    settings: Mapping[str, Any],
) -> None:
    """Write the weights as they were decoded, and print the facts.

    nbytes    all that is stored in place of the weights
    seconds   of pressing alone: by the clock, and of the processor
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    load = round(os.getloadavg()[0], 2)
    save_file({name: w.contiguous() for name, w in weights.items()}, out)
    facts = {
        "tool": package,
        "version": version(package),
        "seconds": round(seconds[0], 2),
        "cpu_seconds": round(seconds[1], 2),
        "peak_rss_mb": round(peak, 1),
        "bytes": nbytes,
        "load": load,
        "threads": torch.get_num_threads(),
        "settings": {**settings, "torch": torch.__version__},
    }
    print(json.dumps(facts), flush=True)
