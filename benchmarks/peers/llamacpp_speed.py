"""Speed of one GGUF file in llama.cpp: prefill and decode, in tokens a second, as one JSON line.

    .peers/llamacpp/bin/python benchmarks/peers/llamacpp_speed.py FILE.gguf --threads 2 --prefill 512 --decode 64

Stand-alone: it runs in either environment of ``llamacpp.sh`` and imports nothing of bitpress. Token ids are random from a fixed
seed, so neither a tokenizer nor a sampler takes part. Prefill starts from an empty cache and asks for the last token's logits;
decode goes on from ``--context`` tokens, one token a call. Every step is waited for. One round of each is run first, untimed.
"""

import argparse
import ctypes
import json
import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_models import LOG, describe, keep_log, last_words

CACHE_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
BATCH = 512


class Session:
    """A model and one context of it, fed with token ids."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = not options.no_extra_bufts
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model)
        if not self.model:
            raise SystemExit(f"error: {path}: not loaded: {last_words()}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(options.prefill, options.context + options.decode)
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = ATTENTION[options.flash_attention]
        params.type_k = params.type_v = CACHE_TYPES[options.cache]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"error: {path}: no context: {last_words()}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def cut(self, length: int) -> None:
        """Keep the first tokens of the cache only."""
        if not llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1):
            raise SystemExit(f"error: the cache cannot be cut to {length} tokens.")

    def feed(self, ids: np.ndarray, step: int) -> None:
        """Decode ids, some at a time; the last logits of each batch are computed."""
        ids = np.ascontiguousarray(ids, np.int32)
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            pointer = part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            failed = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(pointer, len(part)))
            if failed:
                raise SystemExit(f"error: llama_decode returned {failed}.")
            llama_cpp.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        """Return the logits of the last token fed [vocabulary]."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocabulary,)).copy()


def rates(prepare: Callable[[], None], run: Callable[[], None], tokens: int, repeats: int) -> list[float]:
    """Time a run of so many tokens, after one that does not count: tokens a second, ascending."""
    found = []
    for _ in range(repeats + 1):
        prepare()
        start = time.perf_counter()
        run()
        found.append(tokens / (time.perf_counter() - start))
    return sorted(found[1:])


def summary(values: list[float]) -> dict[str, float]:
    p10, p90 = np.percentile(values, [10, 90])
    return {"median": round(statistics.median(values), 2), "p10": round(float(p10), 2), "p90": round(float(p90), 2)}


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time prefill and decode of a file."""
    session = Session(path, options)
    ids = np.random.default_rng(0).integers(0, session.vocabulary, options.context + options.prefill + options.decode)
    row: dict[str, Any] = {}
    if options.prefill:
        prompt = ids[: options.prefill]
        row["prefill_tokens_per_s"] = summary(
            rates(session.clear, lambda: session.feed(prompt, BATCH), options.prefill, options.repeats)
        )
    if options.decode:
        session.clear()
        session.feed(ids[: options.context], BATCH)
        prepare = (lambda: session.cut(options.context)) if options.context else session.clear
        tail = ids[options.context : options.context + options.decode]
        row["decode_tokens_per_s"] = summary(rates(prepare, lambda: session.feed(tail, 1), options.decode, options.repeats))
    if not np.isfinite(session.logits()).all():
        raise SystemExit(f"error: {path}: the logits are not finite.")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="GGUF")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache before decoding")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flash-attention", choices=ATTENTION, default="auto")
    parser.add_argument("--cache", choices=CACHE_TYPES, default="f16", help="type of the key-value cache")
    parser.add_argument("--no-extra-bufts", action="store_true", help="keep the file's layout: no repacking, no AMX")
    options = parser.parse_args()
    if not options.file.exists():
        raise SystemExit(f"error: {options.file}: no such file.")
    if options.threads < 1 or options.repeats < 1 or min(options.prefill, options.decode, options.context) < 0:
        raise SystemExit("error: --threads and --repeats start at 1, the token counts at 0.")
    if options.cache != "f16" and options.flash_attention == "off":
        raise SystemExit(f"error: --cache {options.cache} needs flash attention.")
    if not options.prefill and not options.decode:
        raise SystemExit("error: nothing to time: --prefill and --decode are both 0.")
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    row = measure(options.file, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = describe(options.file)
    if "decode_tokens_per_s" in row:
        row["decode_gb_per_s"] = round(row["decode_tokens_per_s"]["median"] * held["bytes_per_token"] / 1e9, 3)
    log = "".join(LOG)
    attention = options.flash_attention
    if attention == "auto":
        attention = "off" if "Flash Attention not supported" in log else "on"
    settings = {
        "version": llama_cpp.__version__,
        "llamacpp": llama_cpp.llama_version().decode(),
        "system": " ".join(llama_cpp.llama_print_system_info().decode().split()),
        "buffers_mib": {name: float(size) for name, size in re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", log)},
        "flash_attention": attention,
        "cache": options.cache,
        "batch": BATCH,
        **{key: getattr(options, key) for key in ("threads", "prefill", "decode", "context", "repeats", "no_extra_bufts")},
    }
    facts = {"bytes_per_token": held["bytes_per_token"], "bits_per_linear_weight": held["bits_per_linear_weight"]}
    print(json.dumps({"file": options.file.name, **row, **facts, "peak_rss_mb": round(peak / 1e6, 1), **settings}), flush=True)


if __name__ == "__main__":
    main()
