"""NF4 by bitsandbytes, every linear of a checkpoint, no text.

    .peers/golden/bin/python benchmarks/peers/bitsandbytes_nf4.py --model MODEL_DIR --double --out weights.safetensors

Blocks of 64. Bytes are those of the packed codes and of the state that decodes them: float32 absmax, with `--double` in 8 bits with
a float32 scale for 256 of them; its tables of 16 and 256 levels are the same for all weights and count once.
"""

import time

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from exchange import finish, parser, read_linears


def main() -> None:
    arguments = parser("bitsandbytes NF4, dequantized output")
    arguments.add_argument("--block", type=int, default=64)
    arguments.add_argument("--double", action="store_true", help="quantize the scales too")
    options = arguments.parse_args()
    weights, nbytes, seconds, busy, tables = {}, 0, 0.0, 0.0, 0
    for name, w in read_linears(options.model, options.blocks):
        started, idle = time.perf_counter(), time.process_time()
        packed, state = quantize_4bit(w, blocksize=options.block, quant_type="nf4", compress_statistics=options.double)
        seconds += time.perf_counter() - started
        busy += time.process_time() - idle
        weights[name] = dequantize_4bit(packed, state)
        nbytes += packed.nbytes + state.absmax.nbytes
        tables = state.code.nbytes
        if state.nested:
            nbytes += state.state2.absmax.nbytes + state.offset.nbytes
            tables += state.state2.code.nbytes
    settings = {"block": options.block, "double": options.double}
    finish(options.out, weights, "bitsandbytes", nbytes + tables, (seconds, busy), settings)


if __name__ == "__main__":
    with torch.no_grad():
        main()
