"""8-bit weights and 8-bit inputs by torchao, a scale for every output channel and every token, and the states these give.

    .peers/golden/bin/python benchmarks/peers/torchao_schemes.py \
        --model MODEL_DIR --tokens TOKENS.npy --texts TEXTS.npz --scheme int8-dynamic --out states.safetensors
"""

from typing import Any

import torch
from states import parse_args, run, told
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_


def main() -> None:
    args = parse_args("torchao", ["int8-dynamic"])

    def quantize(model: Any, tokens: torch.Tensor) -> Any:
        quantize_(model.model, Int8DynamicActivationInt8WeightConfig())
        return model

    told(lambda: run(args, quantize, "torchao"))


if __name__ == "__main__":
    main()
