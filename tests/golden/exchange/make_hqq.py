"""Write hqq.safetensors: layers that HQQ quantized on a CPU, and its own decoded weights.

    pip install torch==2.13.0 safetensors hqq==0.2.8.post1 && python make_hqq.py

Nothing of bitpress is imported. Tensors are named as in a checkpoint; `NAME.decoded` is what the package decodes with scales and zero points
in float32, so that it rounds nothing between.
"""

import copy
import json
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import save_file

# Name: rows, columns, bits, group, type, and what differs from the package's usual settings.
LAYERS = {
    "eight": (4, 64, 8, 32, torch.float16, {}),
    "six": (4, 32, 6, 16, torch.float16, {}),
    "four": (8, 64, 4, 64, torch.float16, {}),
    "four_row": (6, 40, 4, None, torch.bfloat16, {}),
    "three": (6, 64, 3, 32, torch.float16, {}),
    "two": (8, 64, 2, 16, torch.float32, {}),
    "one": (8, 64, 1, 32, torch.float16, {}),
    "whole": (4, 64, 4, 32, torch.float16, {"optimize": False, "round_zero": True}),
    "small": (4, 64, 4, 32, torch.bfloat16, {}),
    "floats": (4, 64, 2, 32, torch.bfloat16, {"view_as_float": True}),
    "across": (6, 64, 4, 48, torch.float16, {}),
}


def main() -> None:
    torch.set_num_threads(1)
    stored: dict[str, torch.Tensor] = {}
    configs = {}
    for seed, (name, (rows, columns, bits, group, dtype, other)) in enumerate(LAYERS.items()):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
        if name == "small":  # a dead input group, whose zero points are smaller than float16 holds
            w[:, :32] *= 1e-5
        linear.weight.data = w.to(dtype)
        configs[name] = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        configs[name]["weight_quant_params"] |= other
        layer = HQQLinear(linear, configs[name], compute_dtype=dtype, device="cpu")
        stored |= {f"{name}.{leaf}": value for leaf, value in layer.state_dict().items() if value is not None}
        meta = copy.copy(layer.meta) | {"compute_dtype": torch.float32}
        meta |= {"scale": layer.meta["scale"].float(), "zero": layer.meta["zero"].float()}
        stored[f"{name}.decoded"] = Quantizer.dequantize(layer.W_q.data, meta)
    out = Path(__file__).with_name("hqq.safetensors")
    save_file({name: value.detach().contiguous().clone() for name, value in stored.items()}, out)
    told = {"quant_method": "hqq", "quant_config": configs, "skip_modules": ["lm_head"]}
    out.with_suffix(".json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
