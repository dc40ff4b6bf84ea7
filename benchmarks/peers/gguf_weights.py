"""One of llama.cpp's types, every linear of a Llama checkpoint, by llama.cpp's own quantizer; decoded by the gguf package.

    .peers/llamacpp/bin/python benchmarks/peers/gguf_weights.py --model MODEL_DIR --type Q3_K_M --out weights.safetensors

Stand-alone: it runs in the environment of ``llamacpp.sh`` and imports nothing of bitpress. ``--importance FILE.npz`` holds the mean square
of every weight's inputs by the weight's name, in place of llama-imatrix, which averages the same over its text; it is computed elsewhere
and not in the seconds. The embedding stays in bfloat16. A type's name says little: rows that no block of 256 divides fall back to
other types, so the settings list what the linears really are, and bytes are those of their tensors in the file.
"""

import argparse
import ctypes
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf_models import gguf_name, importance_data, keep_log, last_words, read_tensors, write_original


def quantize(original: Path, target: Path, kind: str, importance: Path | None, threads: int) -> tuple[float, float]:
    """Write a file of a type; give the seconds by the clock, and of the processor."""
    code = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if code is None:
        raise SystemExit(f"error: no type is named {kind}.")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = code, threads
    params.token_embedding_type = int(gguf.GGMLQuantizationType.BF16)
    if importance is not None:
        params.imatrix, _held = importance_data(importance)
    started, busy = time.perf_counter(), time.process_time()
    if llama_cpp.llama_model_quantize(os.fsencode(original), os.fsencode(target), params):
        raise SystemExit(f"error: {original}: not quantized to {kind}: {last_words()}")
    return time.perf_counter() - started, time.process_time() - busy


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Undo the reordering of a head's rows into the pairs that llama.cpp rotates."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write float32 tensors as safetensors."""
    header, start = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, start + values.nbytes]}
        start += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="not read: what calibration saw is in --importance")
    parser.add_argument("--type", required=True, help="a name of llama.cpp's LLAMA_FTYPE_MOSTLY_*")
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = {gguf_name(name): name for name, _, _ in read_tensors(options.model) if name.endswith("_proj.weight")}
    with tempfile.TemporaryDirectory() as folder:
        original = write_original(options.model, Path(folder))
        target = Path(folder) / "quantized.gguf"
        seconds = quantize(original, target, options.type, options.importance, options.threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        weights, nbytes, held = {}, 0, dict[str, int]()
        for tensor in gguf.GGUFReader(target).tensors:
            if tensor.name in names:
                w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                name = names[tensor.name]
                projection = name.split(".")[-2]
                weights[name] = halves(w, heads[projection]) if projection in heads else w
                nbytes += int(tensor.n_bytes)
                held[tensor.tensor_type.name] = held.get(tensor.tensor_type.name, 0) + 1
        write_tensors(options.out, weights)
    facts = {
        "tool": "llama_cpp_python",
        "version": llama_cpp.__version__,
        "seconds": round(seconds[0], 2),
        "cpu_seconds": round(seconds[1], 2),
        "peak_rss_mb": round(peak, 1),
        "bytes": nbytes,
        "load": round(os.getloadavg()[0], 2),
        "threads": options.threads,
        "settings": {
            "type": options.type,
            "importance": options.importance is not None,
            "tensors": held,
            "gguf": version("gguf"),
        },
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
