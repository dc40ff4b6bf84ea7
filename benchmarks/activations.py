"""What the native engine's defaults cost: KL divergence from the same engine with float activations and the head's 16 bits.

    python benchmarks/activations.py DIR [DIR ...] [--windows 2 --decoded 128]

One row a directory, a code path and a setting: nats a token on held-out windows of 512 tokens, of a whole prompt at once (`prompt`) and
of the first tokens one by one (`decode`), and the share of a prompt's inputs that stood apart in float. --outliers NAME writes a random
model shaped like Gemma 3 with massive channels and norms of a wide spread in front of DIR's tokenizer, to be quantized and measured.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rows import add_row

from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.runtime.native.assemble import load_engine
from bitpress.runtime.native.engine import Engine
from bitpress.runtime.native.options import EngineOptions

SETTINGS: dict[str, dict[str, Any]] = {
    "8-bit head": {"activations": "none"},
    "8-bit activations": {"activations": "int8", "head": "keep"},
    "defaults": {},
}


def write_outliers(target: Path, tokenizer_of: Path, factor: float = 10.0, seed: int = 1) -> None:
    """Write a random Gemma 3 whose residual stream has six channels `factor` times the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        query_pre_attn_scalar=128,
        sliding_window=256,
        max_position_embeddings=2048,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    massive = torch.randperm(640)[:6]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = 0.5 * torch.randn(parameter.shape)
            if name.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight")):
                parameter.data[massive] *= factor
        else:
            parameter.data = torch.randn(parameter.shape) * parameter.shape[1] ** -0.5
    model.get_input_embeddings().weight.data[:, massive] *= factor / 2
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of every token of `[tokens, vocabulary]`."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def prompt(engine: Engine, tokens: list[int]) -> torch.Tensor:
    engine.reset()
    return engine.forward(tokens, "all")


def decode(engine: Engine, tokens: list[int]) -> torch.Tensor:
    engine.reset()
    return torch.cat([engine.forward([token]) for token in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--decoded", type=int, default=128)
    parser.add_argument("--outliers", type=Path, metavar="NAME")
    options = parser.parse_args()
    if options.outliers:
        write_outliers(options.outliers, options.directories[0])
        return
    for directory in options.directories:
        windows = draw_windows("builtin:heldout", directory, samples=options.windows, length=512, seed=0).inputs.tolist()
        exact = load_engine(directory, EngineOptions(activations="none", head="keep"))
        references = [prompt(exact, window) for window in windows]
        for name, settings in SETTINGS.items():
            engine = load_engine(directory, EngineOptions.of(settings))
            whole = torch.cat([divergence(r, prompt(engine, window)) for r, window in zip(references, windows, strict=True)])
            apart = engine.apart
            first = windows[0][: options.decoded]
            single = divergence(references[0][: options.decoded], decode(engine, first))
            row = {"directory": directory.name, "settings": name, "path": engine.facts["path"], "head": engine.facts["head"]}
            row |= {"kl_prompt": float(whole.mean()), "kl_prompt_most": float(whole.max()), "apart": apart}
            row |= {"kl_decode": float(single.mean()), "kl_decode_most": float(single.max()), "tokens": len(whole)}
            print(json.dumps(add_row("activations", row | {"chosen_path": os.environ.get("BITPRESS_PATH", "")})), flush=True)


if __name__ == "__main__":
    main()
