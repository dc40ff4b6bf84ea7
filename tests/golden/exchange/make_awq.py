"""Write awq.safetensors: layers that AutoAWQ packed, and its own decoded weights.

    pip install torch==2.13.0 safetensors
    pip download --no-deps autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz && python make_awq.py autoawq-0.2.9

The package needs an older transformers, so only its layer and its packing are imported, by a bare package in place of its own.
"""

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

# Name: rows, columns, group. One checkpoint has one size of groups.
LAYERS = {"zeros": (32, 64, 32), "symmetric": (64, 32, 32)}


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1]) / "awq"
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    utils = types.ModuleType("awq.utils.utils")
    utils.get_best_device = lambda: "cpu"
    sys.modules["awq.utils.utils"] = utils
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    stored: dict[str, torch.Tensor] = {}
    for seed, (name, (rows, columns, group)) in enumerate(LAYERS.items()):
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
        blocks = w.view(rows, -1, group)
        low, high = blocks.amin(-1), blocks.amax(-1)
        scales = ((high - low) / 15).half() if name != "symmetric" else (blocks.abs().amax(-1) / 7).half()
        zeros = (-low / scales).round().clamp(0, 15) if name != "symmetric" else torch.full_like(low, 8)
        on_grid = ((blocks / scales[..., None]).round() + zeros[..., None]).clamp(0, 15) - zeros[..., None]
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = (on_grid * scales[..., None]).view(rows, columns)
        layer = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        stored |= {f"{name}.{leaf}": value for leaf, value in layer.state_dict().items()}
        stored[f"{name}.decoded"] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).T
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, Path(__file__).with_name("awq.safetensors"))
    told = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    Path(__file__).with_name("awq.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
