"""Each product alone, by format, shape and rows of input, beside torch's own products of the same shape, in one run.

    make bench Q=kernels
    python benchmarks/kernels.py --formats int4-g64 --shapes 2048x2048 --rows 1 512

Medians of `--repeats` calls after two that are not counted. GB/s are the weight's bytes over the time, TOPS its multiplications and
additions; shares are of the read bandwidth and of the peak of 8-bit products, both measured in the same run. For one row of input the
weights are taken in turn from copies larger than any cache, as a model would take its layers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from bitpress.settings import code_path, share_cores, usable_cores

share_cores()  # torch's idle threads would spin beside the engine's

import torch  # noqa: E402
from rows import add_row  # noqa: E402

from bitpress import native  # noqa: E402
from bitpress.formats import CompressedWeight, Packed, parse_format  # noqa: E402
from bitpress.kernels.native_layout import lay_out  # noqa: E402

SHAPES = ("576x576", "3072x576", "576x1536", "2048x2048", "11264x2048", "2048x5632")
FORMATS = (
    "int2-g64",
    "int3-g64",
    "int4-g64",
    "int4-g64-zero",
    "nf4-g64",
    "mxfp4",
    "nvfp4",
    "ternary-g64",
    "planes2-g64",
    "int8-g64",
)
ROWS = (1, 2, 4, 8, 16, 64, 256, 512)
# Copies of a weight are made up to so many bytes: more than a processor's share of a last-level cache.
BEYOND_CACHE = 256e6
MOST_COPIES = 512


def median_seconds(call: Callable[[int], object], repeats: int) -> float:
    times = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        call(index)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def ours(name: str, n: int, k: int, rows: tuple[int, ...], repeats: int, threads: int) -> dict[int, tuple[float, int]]:
    """Return seconds and bytes of the weight by rows of input."""
    fmt = parse_format(name)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w)
    weight = CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))
    first = lay_out(weight)
    copies = (
        [first] + [lay_out(weight) for _ in range(min(MOST_COPIES, int(BEYOND_CACHE / first.nbytes)))] if 1 in rows else [first]
    )
    multiplier = native.library().Multiplier(threads, code_path())
    found = {}
    for m in rows:
        x, y = np.random.default_rng(0).standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
        count = max(repeats, len(copies) // 4) if m <= 4 else repeats

        def call(i: int, x: np.ndarray = x, y: np.ndarray = y) -> None:
            multiplier.multiply(copies[i % len(copies)].linear, x, y, True)

        found[m] = (median_seconds(call, count), first.nbytes)
    return found


def torch_products(n: int, k: int, m: int, repeats: int) -> dict[str, float]:
    """Return seconds of torch's products of this shape, those that this build has."""
    seconds = {}
    w, x = torch.randn(n, k, dtype=torch.bfloat16), torch.randn(m, k, dtype=torch.bfloat16)
    seconds["torch linear, bf16"] = median_seconds(lambda _: torch.nn.functional.linear(x, w), repeats)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // 64, n, 2, dtype=torch.bfloat16)
    seconds["torch _weight_int4pack_mm_for_cpu, g64"] = median_seconds(
        lambda _: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales), repeats
    )
    a, b = torch.randint(-128, 127, (m, k), dtype=torch.int8), torch.randint(-128, 127, (k, n), dtype=torch.int8)
    if m > 16:  # torch wants more
        seconds["torch _int_mm"] = median_seconds(lambda _: torch._int_mm(a, b), repeats)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="OUTxIN")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = native.library()
    path = library.Multiplier(1, code_path()).path
    read, peak = library.read_speed(1 << 29, options.threads), library.multiply_speed(code_path(), options.threads)
    print(f"{options.threads} threads, {path}: {read / 1e9:.1f} GB/s read, {peak / 1e12:.2f} TOPS at most")
    print(f"{'product':40s} {'shape':12s} {'rows':>5s} {'us':>9s} {'GB/s':>7s} {'TOPS':>7s} {'of read':>8s} {'of peak':>8s}")
    for shape in options.shapes:
        n, k = (int(part) for part in shape.split("x"))
        times: list[tuple[str, int, float, int]] = []
        for name in options.formats:
            for m, (seconds, nbytes) in ours(name, n, k, tuple(options.rows), options.repeats, options.threads).items():
                times.append((name, m, seconds, nbytes))
        for m in options.rows:
            for name, seconds in torch_products(n, k, m, options.repeats).items():
                bytes_of = {"torch linear, bf16": 2.0, "torch _int_mm": 1.0}.get(name, 0.5625)
                times.append((name, m, seconds, int(n * k * bytes_of)))
        for name, m, seconds, nbytes in times:
            gb, tops = nbytes / seconds / 1e9, 2 * m * n * k / seconds / 1e12
            row = {"product": name, "shape": [n, k], "rows": m, "microseconds": round(seconds * 1e6, 1)}
            row |= {"gb_per_s": round(gb, 2), "tops": round(tops, 4), "path": path, "threads": options.threads}
            row |= {"read_gb_per_s": round(read / 1e9, 2), "peak_tops": round(peak / 1e12, 3), "repeats": options.repeats}
            add_row("kernels", row)
            print(
                f"{name:40s} {shape:12s} {m:5d} {seconds * 1e6:9.1f} {gb:7.2f} {tops:7.3f} {gb * 1e9 / read:8.1%} "
                f"{tops * 1e12 / peak:8.1%}"
            )


if __name__ == "__main__":
    main()
