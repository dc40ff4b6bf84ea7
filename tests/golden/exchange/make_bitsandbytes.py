"""Write bitsandbytes.safetensors and bitsandbytes_int8.safetensors: what bitsandbytes compressed on a CPU, and its own decoded weights.

    pip install torch==2.13.0 bitsandbytes==0.50.2 && python make_bitsandbytes.py

Nothing of bitpress is imported. Tensors are named as in a checkpoint, and `NAME.decoded` is the weight that the package dequantizes.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
from safetensors.torch import save_file

# Name: rows, columns, kind, block, nested, type of what is stored.
FOUR = {
    "nf4": (4, 128, "nf4", 64, False, torch.uint8),
    "nf4_nested": (4, 256, "nf4", 64, True, torch.uint8),
    "nf4_across": (4, 48, "nf4", 64, False, torch.uint8),
    "nf4_nested_across": (4, 48, "nf4", 64, True, torch.uint8),
    "nf4_odd": (3, 25, "nf4", 64, False, torch.uint8),
    "nf4_stored": (2, 128, "nf4", 64, False, torch.bfloat16),
    "fp4": (2, 256, "fp4", 128, False, torch.uint8),
    "fp4_nested": (2, 256, "fp4", 128, True, torch.uint8),
}


def weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def main() -> None:
    torch.set_num_threads(1)
    out = Path(__file__).parent
    stored: dict[str, torch.Tensor] = {}
    for seed, (name, (rows, columns, kind, size, nested, storage)) in enumerate(FOUR.items()):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compress_statistics=nested, quant_type=kind, quant_storage=storage)
        w = weight(rows, columns, seed).to(torch.bfloat16)
        layer.weight = bnb.nn.Params4bit(
            w, requires_grad=False, blocksize=size, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        layer.to("cpu")
        if layer.weight.quant_state is None:
            layer.weight._quantize("cpu")
        stored |= {f"{name}.{leaf}": value for leaf, value in layer.state_dict().items()}
        stored[f"{name}.decoded"] = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, out / "bitsandbytes.safetensors")
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    (out / "bitsandbytes.json").write_text(json.dumps(told) + "\n")
    stored = {}
    for seed, (name, rows, columns) in enumerate((("even", 6, 32), ("odd", 5, 21))):
        codes, largest, _ = int8_vectorwise_quant(weight(rows, columns, seed).to(torch.float16))
        stored |= {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        stored[f"{name}.decoded"] = int8_vectorwise_dequant(codes, largest)
    save_file(stored, out / "bitsandbytes_int8.safetensors")
    told = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
    (out / "bitsandbytes_int8.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
