"""Weights and inputs by llm-compressor's preset schemes, as its own examples compress Llama models, and the states these give.

    .peers/llmcompressor/bin/python benchmarks/peers/llmcompressor_schemes.py \
        --model MODEL_DIR --tokens TOKENS.npy --texts TEXTS.npz --scheme w8a8 --out states.safetensors
"""

from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from states import parse_args, run, told
from torch.utils.data import DataLoader

HEAD = ["lm_head"]
RECIPES = {
    "w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
    ],
    "fp8": lambda: [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=HEAD)],
    "fp8-static": lambda: [QuantizationModifier(targets="Linear", scheme="FP8", ignore=HEAD)],
    "nvfp4": lambda: [QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=HEAD)],
    "mxfp4": lambda: [QuantizationModifier(targets="Linear", scheme="MXFP4", ignore=HEAD)],
}


def main() -> None:
    args = parse_args("llm-compressor", list(RECIPES))

    def quantize(model: Any, tokens: torch.Tensor) -> Any:
        rows = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
        texts = DataLoader(Dataset.from_dict(rows).with_format("torch"), batch_size=1, shuffle=False)
        oneshot(model=model, dataset=texts, recipe=RECIPES[args.scheme]())
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - set(HEAD)
        rounded = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
        if rounded != linears:
            raise ValueError(f"layers left as they were: {sorted(linears - rounded)}")
        return model

    told(lambda: run(args, quantize, "llmcompressor"))


if __name__ == "__main__":
    main()
