"""Write mlx_minimum.safetensors: layers that MLX quantized on a CPU, and its own decoded weights.

    pip install "mlx[cpu]==0.32.4" numpy && python make_mlx.py

Nothing of bitpress is imported. Tensors are named as in a checkpoint; `NAME.decoded` is what MLX dequantizes with scales in float32, so that
it rounds nothing. MLX chooses a bias for every group; these are made symmetric, so that they need no minimum.
"""

import json
from pathlib import Path

import mlx.core as mx

BITS = (2, 3, 4, 5, 6, 8)
TYPES = (mx.bfloat16, mx.float16, mx.float32)


def main() -> None:
    mx.set_default_device(mx.cpu)
    stored: dict[str, mx.array] = {}
    told: dict[str, object] = {"group_size": 32, "bits": 4, "mode": "affine"}
    for i, bits in enumerate(BITS):
        name, group = f"bits_{bits}", 64 if bits == 3 else 32
        told[name] = {"group_size": group, "bits": bits}
        w = (mx.random.normal((3, 64), key=mx.random.key(i)) * 0.1).astype(TYPES[i % 3])
        codes, scales, biases = mx.quantize(w, group_size=group, bits=bits)
        stored |= {f"{name}.weight": codes, f"{name}.scales": scales, f"{name}.biases": biases}
        whole = (scales.astype(mx.float32), biases.astype(mx.float32))
        stored[f"{name}.decoded"] = mx.dequantize(codes, *whole, group_size=group, bits=bits)
    for bits in ():
        name = f"mxfp{bits}"
        told[name] = {"group_size": 32, "bits": bits, "mode": name}
        codes, scales = mx.quantize(mx.random.normal((3, 64), key=mx.random.key(bits)), group_size=32, bits=bits, mode=name)
        stored |= {f"{name}.weight": codes, f"{name}.scales": scales}
        stored[f"{name}.decoded"] = mx.dequantize(codes, scales, group_size=32, bits=bits, mode=name)
    out = Path(__file__).with_name("mlx_minimum.safetensors")
    mx.save_safetensors(str(out), stored)
    out.with_suffix(".json").write_text(json.dumps({"quantization": told, "quantization_config": told}) + "\n")


if __name__ == "__main__":
    main()
