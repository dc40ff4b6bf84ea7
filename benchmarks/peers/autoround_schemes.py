"""Weights and inputs by AutoRound's preset schemes, and the states these give.

    .peers/llmcompressor/bin/python benchmarks/peers/autoround_schemes.py \
        --model MODEL_DIR --tokens TOKENS.npy --texts TEXTS.npz --scheme mxfp4 --out states.safetensors

--scheme NAME-rtn is its plain rounding (no steps); without it, its 200 steps a block, which take hours on two cores.
"""

from typing import Any

import torch
import transformers
from auto_round import AutoRound
from states import parse_args, run, told

SCHEMES = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def main() -> None:
    args = parse_args("auto-round", [name + end for name in SCHEMES for end in ("", "-rtn")])

    def quantize(model: Any, tokens: torch.Tensor) -> Any:
        rounder = AutoRound(
            model,
            transformers.AutoTokenizer.from_pretrained(args.model),
            scheme=SCHEMES[args.scheme.removesuffix("-rtn")],
            iters=0 if args.scheme.endswith("-rtn") else 200,
            seqlen=tokens.shape[1],
            nsamples=tokens.shape[0],
            batch_size=8,
            dataset=list(tokens.split(8)),
            device_map="cpu",
            amp=False,
        )
        rounded, _ = rounder.quantize()
        return rounded

    told(lambda: run(args, quantize, "auto-round"))


if __name__ == "__main__":
    main()
