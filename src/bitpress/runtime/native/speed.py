"""The speed of the native engine, compared with the machine's: memory bandwidth for decoding, arithmetic for a prompt.

All figures come from one run: the machine's speeds are measured right after the model's, with as many threads. Tokens are drawn at
random with a fixed seed; one round is run before the clock starts.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitpress.errors import UsageError
from bitpress.library import library
from bitpress.runtime.native.architectures import Layout
from bitpress.runtime.native.engine import Engine
from bitpress.runtime.native.options import USUAL, EngineOptions
from bitpress.runtime.opening import load_native

__all__ = ["bench_decode", "bench_prefill", "block_weights", "cache_positions"]

CHUNK = 512
BITS = ("bits_stored", "bits_in_memory")
READ_BYTES = 1 << 29  # larger than the processor's caches


def bench_decode(
    directory: str | Path,
    options: EngineOptions = USUAL,
    *,
    context: int = 0,
    tokens: int = 64,
    repeats: int = 5,
    width: int | None = None,
) -> dict[str, Any]:
    """Measure the decoding of single tokens after a text of `context` tokens.

    The bytes of a token are those of all weights that it is multiplied with and of the keys and values that it attends to.
    """
    engine, facts = _load(directory, options, max(context, 1) + tokens, repeats, width)
    text = _random_tokens(engine, max(context, 1))
    _run(engine, text)

    def decode() -> None:
        for _ in engine.generate(text.tolist(), max_tokens=tokens):
            pass

    rates = _rates(decode, tokens, repeats)
    facts["peak_memory_bytes"] = _peak_memory()
    first = len(text)
    positions = sum(cache_positions(engine.layout, length) for length in range(first, first + tokens)) / tokens
    read = engine.facts["bytes_per_token"] + engine.facts["cache_bytes_per_position"] * positions
    speed = library().read_speed(READ_BYTES, engine.facts["threads"])
    return {
        "what": "decode",
        **facts,
        "context": context,
        "tokens": tokens,
        "tokens_per_second": rates,
        "bytes_per_token": read,
        "gigabytes_per_second": read * rates["median"] / 1e9,
        "machine_gigabytes_per_second": speed / 1e9,
        "share": read * rates["median"] / speed,
    }


def bench_prefill(
    directory: str | Path,
    options: EngineOptions = USUAL,
    *,
    context: int = 0,
    tokens: int = 512,
    repeats: int = 5,
    width: int | None = None,
) -> dict[str, Any]:
    """Measure reading a prompt of `tokens` tokens after a text of `context` tokens.

    Operations are two for every weight in the blocks' linear layers; attention and the head, which runs once, are not counted.
    """
    engine, facts = _load(directory, options, context + tokens, repeats, width)
    text = _random_tokens(engine, context + tokens)
    if context:
        _run(engine, text[:context])

    def prefill() -> None:
        engine.truncate(context)
        _run(engine, text[context:])

    rates = _rates(prefill, tokens, repeats)
    facts["peak_memory_bytes"] = _peak_memory()
    operations = 2 * block_weights(engine.layout) * rates["median"]
    speed = library().multiply_speed(engine.facts["path"], engine.facts["threads"])
    return {
        "what": "prefill",
        **facts,
        "apart": engine.apart,
        "context": context,
        "tokens": tokens,
        "tokens_per_second": rates,
        "weights_per_token": block_weights(engine.layout),
        "teraoperations_per_second": operations / 1e12,
        "machine_teraoperations_per_second": speed / 1e12,
        "share": operations / speed,
    }


def block_weights(layout: Layout) -> int:
    """Count the weights in the linear layers of all blocks."""
    attention = layout.hidden * layout.head * 2 * (layout.heads + layout.kv_heads)
    return layout.layers * (attention + 3 * layout.hidden * layout.intermediate)


def cache_positions(layout: Layout, length: int) -> float:
    """Return how many positions a token after `length` others attends to: the mean over layers, some of which may have a window."""
    return sum(min(length, window or length) for window in layout.window) / layout.layers


def _load(
    directory: str | Path, options: EngineOptions, room: int, repeats: int, width: int | None
) -> tuple[Engine, dict[str, Any]]:
    if repeats < 1:
        raise UsageError(f"repeats={repeats}: it must be 1 or more.")
    start = time.perf_counter()
    text = load_native(directory, replace(options, context=room), width=width)
    seconds, engine = time.perf_counter() - start, text.engine
    facts = {key: engine.facts[key] for key in ("path", "threads", "activations", "inputs", "cache", "head", "expanded", *BITS)}
    facts |= {"directory": str(directory), "repeats": repeats, "load_seconds": seconds, "file_bytes": text.file_bytes}
    return engine, facts


def _random_tokens(engine: Engine, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(engine.layout.vocabulary, size=count, dtype=np.int32)


def _run(engine: Engine, tokens: np.ndarray) -> None:
    """Read tokens as `generate` does: in chunks, with logits of the last one only."""
    starts = range(0, len(tokens), CHUNK)
    for start in starts:
        engine.read(tokens[start : start + CHUNK], logits=start == starts[-1])


def _rates(work: Callable[[], None], tokens: int, repeats: int) -> dict[str, float]:
    """Run once without measuring, then `repeats` times; return percentiles of tokens per second."""
    work()
    return _percentiles(tokens / _seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _percentiles(rates: Iterable[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(list(rates), (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
