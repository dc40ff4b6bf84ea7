"""How far the native engine is from transformers on the same compressed weights, decoded to float32.

    python benchmarks/agreement.py DIR [--windows 8 --prompts 20 --tokens 64]

One row a setting of the engine: KL divergence (nats a token) and top-1 agreement on held-out windows of 512 tokens, and greedy text of
so many prompts beside that of transformers, both of them shown the same text so far: how many tokens differ, and how far apart
transformers' two largest logits are where one does.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rows import add_row

from bitpress.api import load
from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.runtime.native.assemble import load_engine
from bitpress.runtime.native.options import EngineOptions

SETTINGS: dict[str, dict[str, Any]] = {
    "float activations, fp16 cache, head as stored": {"activations": "none", "cache": "fp16", "head": "keep"},
    "8-bit activations": {"activations": "int8", "cache": "fp16", "head": "keep"},
    "8-bit cache": {"activations": "none", "cache": "int8", "head": "keep"},
    "8-bit head": {"activations": "none", "cache": "fp16", "head": "int8-g64"},
    "usual: 8-bit activations and head": {"activations": "int8", "cache": "fp16", "head": "int8-g64"},
    "all of them": {"activations": "int8", "cache": "int8", "head": "int8-g64"},
}


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Return mean KL divergence and top-1 agreement of `[tokens, vocabulary]`."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((reference.argmax(-1) == logits.argmax(-1)).double().mean())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    windows = draw_windows("builtin:heldout", options.directory, samples=options.windows, length=512, seed=0).inputs
    prompts = draw_windows("builtin:heldout", options.directory, samples=options.prompts, length=32, seed=1).inputs
    model = load(options.directory, dtype="fp32")
    references = [model(window[None]).logits[0] for window in windows]
    texts, margins = [], []
    for prompt in prompts:
        made = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=[],
        )[0]
        logits = model(made[None]).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2, -1).values
        texts.append(made)
        margins.append(top[:, 0] - top[:, 1])
    del model
    for name, settings in SETTINGS.items():
        engine = load_engine(options.directory, EngineOptions.of(settings))
        found = []
        for window, reference in zip(windows, references, strict=True):
            engine.reset()
            found.append(divergence(reference, engine.forward(window.tolist(), "all")))
        differing: list[float] = []
        for prompt, text, margin in zip(prompts, texts, margins, strict=True):
            engine.reset()
            engine.forward(prompt.tolist()[:-1], "none")
            for step, token in enumerate(text[len(prompt) :].tolist()):
                logits = engine.forward([int(text[len(prompt) - 1 + step])])[0]
                if int(logits.argmax()) != token:
                    differing.append(float(margin[step]))
        kl, same = (sum(values) / len(values) for values in zip(*found, strict=True))
        row = {"directory": options.directory.name, "settings": name, **settings, "path": engine.facts["path"]}
        row |= {"kl": kl, "top1_agreement": same, "tokens": int(windows.numel())}
        row |= {"greedy_tokens": options.prompts * options.tokens, "greedy_differing": len(differing)}
        row |= {"largest_margin_differing": max(differing, default=0.0)}
        print(json.dumps(add_row("agreement", row)), flush=True)


if __name__ == "__main__":
    main()
