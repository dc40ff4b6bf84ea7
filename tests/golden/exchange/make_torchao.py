"""Write torchao.safetensors: layers that torchao quantized on a CPU, flattened as transformers saves them, and its own decoded weights.

    pip install torch==2.13.0 safetensors torchao==0.18.0 && python make_torchao.py

Nothing of bitpress is imported. Tensors are named as in a checkpoint and the header says what they are; `NAME.decoded` is what the package
decodes in float32.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerTensor,
    quantize_,
)

ASYMMETRIC = MappingType.ASYMMETRIC
# Name: rows, columns, the type of the weight, and how it is quantized.
LAYERS = {
    **{
        f"int{bits}": (
            6,
            64,
            torch.float32,
            IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32)),
        )
        for bits in range(1, 9)
    },
    "half": (4, 64, torch.bfloat16, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))),
    "axis": (5, 40, torch.float32, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))),
    **{
        f"zero{bits}": (
            6,
            48,
            torch.float16,
            IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(16), mapping_type=ASYMMETRIC),
        )
        for bits in (1, 3, 4, 8)
    },
    "bytes": (6, 40, torch.bfloat16, Int8WeightOnlyConfig(version=2)),
    "whole": (6, 40, torch.float32, Int8WeightOnlyConfig(version=2, granularity=PerTensor())),
    "float8": (6, 40, torch.bfloat16, Float8WeightOnlyConfig(version=2)),
}


def decode(weight: torch.Tensor) -> torch.Tensor:
    """Decode with scales in float32, so that nothing is rounded between."""
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        return weight.to(torch.float32).dequantize()
    return weight.dequantize(output_dtype=torch.float32)


def main() -> None:
    torch.set_num_threads(1)
    weights: dict[str, torch.Tensor] = {}
    for seed, (name, (rows, columns, dtype, config)) in enumerate(LAYERS.items()):
        linear = torch.nn.Linear(columns, rows, bias=False)
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
        linear.weight.data = (w + 0.05 * name.startswith("zero")).to(dtype)
        model = torch.nn.Sequential(linear)
        quantize_(model, config)
        weights[f"{name}.weight"] = model[0].weight.detach()
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(99))
    weights["float8_whole.weight"] = Float8Tensor.from_hp(w, granularity=PerTensor())
    stored, metadata = flatten_tensor_state_dict(weights)
    decoded = {f"{name.removesuffix('.weight')}.decoded": decode(weight) for name, weight in weights.items()}
    out = Path(__file__).with_name("torchao.safetensors")
    save_file({name: value.contiguous().clone() for name, value in (stored | decoded).items()}, out, metadata)
    out.with_suffix(".json").write_text(
        json.dumps({"quant_method": "torchao", "quant_type": {"default": {"_type": "many"}}}) + "\n"
    )


if __name__ == "__main__":
    main()
