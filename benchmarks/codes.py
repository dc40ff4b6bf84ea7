"""How fast weights become codes and bytes and come back: every grid of the table, beside torchao, bitsandbytes and hqq in one run.

    make peers && make bench Q=codes
    python benchmarks/codes.py --formats int4-g64-zero nf4-g64 --size 4096

Speeds are in millions of weights a second, medians of up to `--repeats`, on a matrix of `--size` squared (vector codebooks: a quarter of
its rows). `fit` is min-max; `encode` gives codes, `pack` bytes, `unpack` codes again and `decode` float32 weights.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from rows import ROOT, add_row

from bitpress.formats import GRIDS, Packed, parse_format

PEER = ROOT / ".peers" / "golden" / "bin" / "python"
# Seconds after which an action is not repeated any more.
PATIENCE = 1.0


def usual_formats() -> list[str]:
    """One format for every grid, and what the peers have."""
    names = [f"{name}-g64" for name in GRIDS]
    return [*names, "int4-g64-zero", "int3-g64-zero", "int2-g64-zero", "nvfp4", "mxfp4", "nf4-g64-dq", "ternary-g64-base3"]


def speed(action: Callable[[], Any], weights: int, repeats: int) -> dict[str, float]:
    """Return median, 10th and 90th percentile in millions of weights a second; what takes long is repeated less."""
    rates: list[float] = []
    spent, warm = 0.0, False
    while len(rates) < repeats and (spent < PATIENCE or not rates):
        start = time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        spent += seconds
        if warm or seconds > PATIENCE:
            rates.append(weights / seconds / 1e6)
        warm = True
    rates.sort()
    return {"median": rates[len(rates) // 2], "p10": rates[len(rates) // 10], "p90": rates[-1 - len(rates) // 10]}


def measure(name: str, size: int, repeats: int) -> list[dict[str, Any]]:
    fmt = parse_format(name)
    scalar = fmt.grid.span == 1
    w = torch.randn(size if scalar else size // 4, size, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    packed = Packed.pack(fmt, codes, params)
    actions: dict[str, Callable[[], Any]] = {
        "fit": lambda: fmt.fit(w),
        "encode": lambda: fmt.encode(w, params),
        "pack": lambda: Packed.pack(fmt, codes, params),
        "unpack": packed.unpack,
        "decode": lambda: fmt.decode(codes, params),
    }
    assert torch.equal(packed.dequantize(), fmt.decode(codes, params))
    rows = []
    for action, call in actions.items():
        times = speed(call, w.numel(), repeats)
        rows.append({"tool": "bitpress", "format": name, "action": action, "shape": list(w.shape), **times})
    return rows


def peers(size: int, repeats: int) -> list[dict[str, Any]]:
    script = ROOT / "benchmarks" / "peers" / "codes.py"
    command = [
        str(PEER),
        str(script),
        "--size",
        str(size),
        "--repeats",
        str(repeats),
        "--threads",
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=usual_formats())
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.formats:
        rows += measure(name, options.size, options.repeats)
    if PEER.exists():
        rows += peers(options.size, options.repeats)
    else:
        print("the peers' environment is not here; run make peers.")
    print(f"{'tool':26s} {'format':20s} {'action':8s}  M weights/s (p10 .. p90)")
    for row in rows:
        add_row("codes", row)
        print(
            f"{row['tool']:26s} {row['format']:20s} {row['action']:8s} {row['median']:8.1f} ({row['p10']:.1f} .. {row['p90']:.1f})"
        )


if __name__ == "__main__":
    main()
