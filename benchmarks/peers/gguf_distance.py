"""How far GGUF files are from their original in llama.cpp itself: KL divergence, agreement and perplexity on given tokens.

    .peers/llamacpp/bin/python benchmarks/peers/gguf_distance.py BF16.gguf A.gguf B.gguf --tokens prose.npy code.npy

Stand-alone: it runs in the environment of ``llamacpp.sh`` and imports nothing of bitpress. A token file is an int64 array
`[windows, length]`; every window is a text of its own. All files run in one process with the same settings (cache in fp16), window by
window, so that no logits are kept. One JSON line for each file: its bytes, and for each token file the mean KL divergence from the
original in nats a token, the half-width of its 95 % interval over windows, the share of tokens with the same most likely next token, and
both perplexities.
"""

import argparse
import ctypes
import json
import math
import os
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_models import keep_log


class Judged:
    """A file that is open."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        self.path = path
        options = {"n_ctx": length, "n_batch": length, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options)

    def log_probabilities(self, window: np.ndarray) -> np.ndarray:
        """Return those of every next token, `[length, vocabulary]` in float32."""
        self.model.reset()
        self.model.eval(window.tolist())
        logits = self.model.scores[: len(window)].astype(np.float32)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return logits


def figures(windows: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    """Return means over windows of one length, and the half-width of the interval of their mean divergence."""
    kl = np.array([row["kl"] for row in windows])
    mean = {key: float(np.mean([row[key] for row in windows])) for key in windows[0]}
    return {
        "kl_mean": mean["kl"],
        "kl_ci95": float(1.96 * kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else None,
        "top1_agreement": mean["same"],
        "perplexity": math.exp(mean["loss"]),
        "perplexity_original": math.exp(mean["loss_original"]),
        "tokens": tokens,
        "windows": len(kl),
    }


def loss(log_q: np.ndarray, window: np.ndarray) -> float:
    return float(-log_q[np.arange(len(window) - 1), window[1:]].mean(dtype=np.float64))


def distance(log_p: np.ndarray, log_q: np.ndarray, window: np.ndarray) -> dict[str, float]:
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float64)
    return {
        "kl": float(divergence.mean()),
        "same": float((log_p.argmax(-1) == log_q.argmax(-1)).mean()),
        "loss": loss(log_q, window),
        "loss_original": loss(log_p, window),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    texts = {path.stem: np.load(path) for path in options.tokens}
    length = max(windows.shape[1] for windows in texts.values())
    original = Judged(options.original, length, options.threads)
    files = [Judged(path, length, options.threads) for path in options.files]
    found: dict[Path, dict[str, Any]] = {file.path: {} for file in files}
    for name, windows in texts.items():
        rows: dict[Path, list[dict[str, float]]] = {file.path: [] for file in files}
        for window in windows:
            log_p = original.log_probabilities(window)
            for file in files:
                rows[file.path].append(distance(log_p, file.log_probabilities(window), window))
        for path, told in rows.items():
            found[path][name] = figures(told, windows.size)
    for path, told in found.items():
        facts = {"file": str(path), "bytes": path.stat().st_size, "texts": told, "version": llama_cpp.__version__}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
