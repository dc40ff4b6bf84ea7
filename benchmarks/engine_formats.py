"""How fast the native engine runs each number format: decode and prefill tokens a second, GB/s and bits in memory.

    make bench Q=engine_formats                                    the formats of FORMATS, on SmolLM2
    python benchmarks/engine_formats.py --formats tcq2-row ternary-g64-base3 --context 2048

Weights are rounded to nearest: speed does not depend on how codes were chosen. Every figure is one `bitpress bench` in a process of its
own, beside the machine's bandwidth or arithmetic in that same process. A row of benchmarks/results/engine_formats.jsonl is one format's
decode or prefill.
"""

import argparse
import os

from engine import MODELS, ours
from rows import add_row

FORMATS = (
    *("int2-g64", "int3-g64", "int4-g64", "int3-g64-zero-s6", "int4-g16-zero-s4", "int8-row"),
    *("nf4-g64", "nf4-g64-dq", "nvfp4", "mxfp4", "iq3k-g32", "iq4k-g32"),
    *("ternary-g64", "ternary-g64-base3", "ternary-row-base3", "trits2-g128-base3", "planes2-g64"),
    *("tcq1.5-row", "tcq2-row", "tcq2.5-row", "tcq3-row", "tcq3.5-row", "tcq4-row"),
    *("e8p-row", "gauss4x2-row", "gauss6x2-row", "gauss8x2-row", "kmeans3-row", "kmeans4-row", "vq8x4-row"),
    *("olive4-row", "olive4a-row", "olive8-row", "pvq8k5-g8", "e4m3-g64", "e2m3-g64-split", "bipolar8-g64-nested"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache before a decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(f"{'format':22s} stored  memory  {'decode':>9s}  GB/s  {'prefill':>9s}  tokens/s")
    for name in options.formats:
        decode = ours(options.model, name, "decode", options, "--context", str(options.context))
        prefill = ours(options.model, name, "prefill", options)
        for what, row in (("decode", decode), ("prefill", prefill)):
            add_row("engine_formats", {"model": options.model, "threads": options.threads, "what": what, **row})
        speeds = [row["tokens_per_second"]["median"] for row in (decode, prefill)]
        print(
            f"{name:22s} {decode['bits_stored']:6.2f} {decode['bits_in_memory']:7.2f} {speeds[0]:10.1f} "
            f"{decode['gigabytes_per_second']:5.1f} {speeds[1]:10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
