"""HQQ by its own package, every linear of a checkpoint: half-quadratic zero points, no text.

    .peers/golden/bin/python benchmarks/peers/hqq_weights.py --model MODEL_DIR --bits 3 --out weights.safetensors

The package's own configuration (20 iterations; zero points rounded at 4 bits), groups along the input, scales and zero points
in the checkpoint's type. Bytes are those of the packed codes as the package holds them (10 codes of 3 bits in 32), scales and zero
points. Weights are as the package decodes them, in the checkpoint's type.
"""

import time

import torch
from exchange import finish, parser, read_linears
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    arguments = parser("HQQ, dequantized output")
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--group", type=int, default=64)
    arguments.add_argument("--axis", type=int, default=1, help="1: groups along the input; 0: along the output")
    options = arguments.parse_args()
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group, axis=options.axis)
    weights, nbytes, seconds, busy = {}, 0, 0.0, 0.0
    for name, w in read_linears(options.model, options.blocks):
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.weight.data = w
        started, idle = time.perf_counter(), time.process_time()
        pressed = HQQLinear(linear, config, compute_dtype=w.dtype, device="cpu", del_orig=False)
        seconds += time.perf_counter() - started
        busy += time.process_time() - idle
        weights[name] = pressed.dequantize()
        nbytes += sum(held.nbytes for held in (pressed.W_q, pressed.meta["scale"], pressed.meta["zero"]))
    settings = {
        "bits": options.bits,
        "group": options.group,
        "axis": options.axis,
        "scales": str(w.dtype).removeprefix("torch."),
    }
    finish(options.out, weights, "hqq", nbytes, (seconds, busy), settings)


if __name__ == "__main__":
    with torch.no_grad():
        main()
