"""Speed of a model in transformers, bf16: prefill and decode, in tokens a second, as one JSON line.

    .venv/bin/python benchmarks/peers/transformers_speed.py MODEL_DIR --threads 2

Token ids are random from a fixed seed. Decode goes on from `--context` tokens, one token a call, with the usual dynamic cache.
"""

import argparse
import inspect
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def summary(values: list[float]) -> dict[str, float]:
    p10, p50, p90 = np.percentile(values, [10, 50, 90])
    return {"median": round(float(p50), 2), "p10": round(float(p10), 2), "p90": round(float(p90), 2)}


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 16384)))
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    prefill, decode = [], []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        model(ids[:, : options.prefill], use_cache=True, logits_to_keep=1)
        prefill.append(options.prefill / (time.perf_counter() - start))
    for _ in range(options.repeats + 1):
        cache = DynamicCache(config=model.config)
        if options.context:
            model(ids[:, : options.context], **{argument: cache}, logits_to_keep=1)
        start = time.perf_counter()
        for step in range(options.decode):
            at = options.context + step
            model(ids[:, at : at + 1], **{argument: cache}, logits_to_keep=1)
        decode.append(options.decode / (time.perf_counter() - start))
    return {"prefill_tokens_per_s": summary(prefill[1:]), "decode_tokens_per_s": summary(decode[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = measure(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({**row, "version": transformers.__version__, "torch": torch.__version__, "peak_rss_mb": round(peak)}))


if __name__ == "__main__":
    main()
