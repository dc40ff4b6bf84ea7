"""Write compressed_tensors.safetensors: layers that compressed-tensors compressed, its configuration, and its own decoded weights.

    pip install torch==2.13.0 compressed-tensors==0.20.0 && python make_compressed_tensors.py

Nothing of bitpress is imported. Tensors are named as in a checkpoint, and `NAME.decoded` is the weight that the package decompresses;
compressed_tensors.json is the quantization_config of the model.
"""

import json
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors.model_compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def integer(bits: int, strategy: str, symmetric: bool, group: int | None = None) -> dict[str, object]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "group_size": group}


def decimal(strategy: str, **more: object) -> dict[str, object]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}


# Name: rows, columns, type, weights, inputs.
LAYERS: dict[str, tuple[int, int, torch.dtype, dict[str, object], dict[str, object] | None]] = {
    "pack.two": (6, 32, torch.bfloat16, integer(2, "group", True, 16), None),
    "pack.three": (5, 72, torch.float16, integer(3, "group", False, 24), None),
    "pack.four": (12, 64, torch.bfloat16, integer(4, "group", True, 32), None),
    "pack.four_zero": (12, 64, torch.bfloat16, integer(4, "group", False, 32), None),
    "pack.five": (7, 20, torch.float32, integer(5, "channel", False), None),
    "pack.eight": (4, 21, torch.bfloat16, integer(8, "channel", True), None),
    "pack.inputs": (4, 32, torch.bfloat16, integer(4, "group", True, 16), INT8),
    "ints.token": (6, 20, torch.bfloat16, integer(8, "channel", True), INT8),
    "ints.static": (6, 20, torch.bfloat16, integer(8, "channel", False), INT8 | {"strategy": "tensor", "dynamic": False}),
    "ints.static_zero": (
        *(6, 20, torch.float16, integer(8, "tensor", True)),
        INT8 | {"strategy": "tensor", "dynamic": False, "symmetric": False},
    ),
    "floats.token": (6, 20, torch.bfloat16, decimal("channel"), FLOAT8),
    "floats.static": (6, 20, torch.bfloat16, decimal("tensor"), FLOAT8 | {"strategy": "tensor", "dynamic": False}),
    "floats.block": (
        8,
        32,
        torch.float32,
        decimal("block", block_structure=[4, 16]),
        FLOAT8 | {"strategy": "group", "group_size": 16},
    ),
    "floats.odd_block": (6, 24, torch.bfloat16, decimal("block", block_structure=[4, 16]), None),
    "mx.eight": (4, 64, torch.bfloat16, decimal("group", group_size=32, scale_dtype="torch.uint8"), None),
    "mx.six": (4, 64, torch.bfloat16, decimal("group", group_size=32, scale_dtype="torch.uint8") | {"num_bits": 6}, None),
    "mx.four": (4, 64, torch.bfloat16, decimal("group", group_size=32, scale_dtype="torch.uint8") | {"num_bits": 4}, None),
    "nv.four": (
        *(4, 64, torch.bfloat16),
        *(decimal("tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn") | {"num_bits": 4}, None),
    ),
}


class Named(torch.nn.Module):
    """A module whose children are the layers, by their names."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns, dtype, _, _) in LAYERS.items():
            parent, leaf = name.split(".")
            if not hasattr(self, parent):
                setattr(self, parent, torch.nn.Module())
            setattr(getattr(self, parent), leaf, torch.nn.Linear(columns, rows, bias=False, dtype=dtype))


def blocks_of(w: torch.Tensor, args) -> torch.Tensor:
    """Return the weights that share a scale along the last axis, in the shape of the scales."""
    if args.strategy == "tensor":
        return w.reshape(1, -1)
    if args.strategy == "channel":
        return w[:, None]
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
        cut = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        return cut.transpose(1, 2).flatten(2)
    return w.unflatten(-1, (-1, args.group_size))


def main() -> None:
    torch.set_num_threads(1)
    model = Named()
    groups = {
        f"group_{i}": QuantizationScheme(targets=[name], weights=weights, input_activations=inputs)
        for i, (name, (_, _, _, weights, inputs)) in enumerate(LAYERS.items())
    }
    config = QuantizationConfig(config_groups=groups, quantization_status="frozen", format="dense")
    apply_quantization_config(model, config)
    for seed, name in enumerate(LAYERS):
        layer = model.get_submodule(name)
        w = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        layer.weight.data = w.to(layer.weight.dtype)
        args = layer.quantization_scheme.weights
        blocks = blocks_of(layer.weight.data, args)
        shared = None
        if args.strategy == "tensor_group":
            shared = generate_gparam(blocks.amin(), blocks.amax())
            layer.weight_global_scale.data = shared
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=shared)
        layer.weight_scale.data = scale.to(layer.weight.dtype) if shared is None else scale
        layer.weight_zero_point.data = zero
        inputs = layer.quantization_scheme.input_activations
        if inputs is not None and not inputs.dynamic:
            scale, zero = calculate_qparams(torch.tensor([-1.3]), torch.tensor([2.9]), inputs)
            layer.input_scale.data, layer.input_zero_point.data = scale.to(layer.weight.dtype), zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        compressor.update_config(folder)
        told = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    stored = {name: value.detach().clone() for name, value in model.state_dict().items()}
    compressor.decompress_model(model)
    decoded = {f"{name}.decoded": model.get_submodule(name).weight.detach().clone() for name in LAYERS}
    out = Path(__file__).with_name("compressed_tensors.safetensors")
    save_file(stored | decoded, out)
    out.with_suffix(".json").write_text(json.dumps(told, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
