"""Llama checkpoints as GGUF files of llama.cpp: one in the checkpoint's own precision, then one for each type asked for.

    .peers/llamacpp/bin/python benchmarks/peers/gguf_models.py MODEL_DIR OUT_DIR --types Q4_0 Q4_K_M Q3_K_M Q2_K Q8_0

Stand-alone: it runs in the environment of ``llamacpp.sh`` and imports nothing of bitpress. ``--types`` takes every name of
llama.cpp's ``LLAMA_FTYPE_MOSTLY_*``; ``--importance`` is that of ``gguf_weights.py``. A type's name says little: rows that no block of 256
divides fall back to other types, and heads and embeddings get types of their own. So each file's JSON line lists what the
file really holds. Files that are there already are kept. Tensors are copied one at a time.
"""

import argparse
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = {"BF16": gguf.GGMLQuantizationType.BF16, "F16": gguf.GGMLQuantizationType.F16, "F32": gguf.GGMLQuantizationType.F32}
STORED = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
LOG: list[str] = []


@llama_cpp.llama_log_callback
def keep_log(level: int, text: bytes, data: Any) -> None:
    """Take what llama.cpp would print."""
    LOG.append(text.decode(errors="replace"))


def last_words() -> str:
    """Return the end of the log, in one line."""
    return " ".join("".join(LOG).split("\n")[-4:]).strip()


def read_tensors(model: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, type and values of every tensor of a checkpoint; bfloat16 as its 16 bits."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            kind = entry["dtype"]
            if kind not in STORED:
                raise SystemExit(f"error: {path}: {name} is {kind}; only {', '.join(STORED)} are converted.")
            start = 8 + length + entry["data_offsets"][0]
            yield name, kind, np.memmap(path, STORED[kind], "r", start, tuple(entry["shape"]))


def gguf_name(name: str) -> str:
    """Translate a tensor's name: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    stem, _, ending = name.rpartition(".")
    parts = stem.split(".", 3)
    layer = parts[2] if stem.startswith("model.layers.") else None
    short = NAMES.get(parts[3] if layer is not None else stem)
    if short is None or ending != "weight":
        raise SystemExit(f"error: {name} is no tensor of a plain Llama model.")
    return f"blk.{layer}.{short}.weight" if layer is not None else f"{short}.weight"


def interleave_rotary(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a head's rows from halves (0, d/2, ...) to the neighbouring pairs that llama.cpp rotates for Llama."""
    return np.ascontiguousarray(w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)


def convert(name: str, kind: str, values: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Return a tensor as the file stores it: norms in float32, matrices unchanged but for the rotary order of q and k."""
    if values.ndim == 1:
        wide = (values.astype("<u4") << 16).view("<f4") if kind == "BF16" else values.astype("<f4")
        return "F32", wide
    if name.endswith("q_proj.weight"):
        return kind, interleave_rotary(values, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return kind, interleave_rotary(values, config.get("num_key_value_heads", config["num_attention_heads"]))
    return kind, values


def add_parameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the shape of the model."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise SystemExit("error: only Llama models without biases are converted.")
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"error: rotary scaling {rope['rope_type']} is not converted.")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_vocabulary(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    """Write a byte-level BPE vocabulary; where there is none, a nameless one of the model's size, for use by id alone."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {}}
    if tokenizer["model"].get("type") != "BPE" or not tokenizer["model"].get("merges"):
        writer.add_tokenizer_model("none")
        return
    pre = tokenizer["pre_tokenizer"]
    kinds = [step["type"] for step in pre.get("pretokenizers", [pre])]
    known = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}
    if tuple(kinds) not in known:
        raise SystemExit(f"error: {path}: the pre-tokenizer {kinds} is not converted.")
    words = {number: (word, gguf.TokenType.NORMAL) for word, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        words[token["id"]] = (token["content"], kind)
    rows = [words.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[tuple(kinds)])
    writer.add_token_list([word for word, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for label, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        if isinstance(config.get(f"{label}_token_id"), int):
            add(config[f"{label}_token_id"])
    writer.add_add_bos_token(False)


def write_original(model: Path, out: Path) -> Path:
    """Write the checkpoint in its own precision, named after it."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)

    def tensors() -> Iterator[tuple[str, str, np.ndarray]]:
        for name, kind, values in read_tensors(model):
            if not (tied and name == "lm_head.weight"):
                yield name, kind, values

    kinds = [kind for _, kind, values in tensors() if values.ndim == 2]
    if len(set(kinds)) != 1:
        raise SystemExit(f"error: {model}: matrices of {len(set(kinds))} types; one is needed.")
    target = out / f"{kinds[0]}.gguf"
    if target.exists():
        return target
    partial = target.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kinds[0]}" if kinds[0] != "F32" else "ALL_F32"])
    add_parameters(writer, config)
    add_vocabulary(writer, model, config)
    for name, kind, values in tensors():
        stored = "F32" if values.ndim == 1 else kind
        size = values.size * STORED[stored].itemsize
        writer.add_tensor_info(gguf_name(name), values.shape, STORED[stored], size, raw_dtype=TYPES[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind, values in tensors():
        writer.write_tensor_data(convert(name, kind, values, config)[1])
    writer.close()
    partial.rename(target)
    return target


def importance_data(path: Path) -> tuple[ctypes.Array[llama_cpp.llama_model_imatrix_data], list[np.ndarray]]:
    """Return the array that llama.cpp reads, closed by an entry without a name, and the memory that it points into."""
    given = {gguf_name(name): np.ascontiguousarray(values, np.float32) for name, values in np.load(path).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(given) + 1))()
    for entry, (name, values) in zip(entries, given.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, list(given.values())


def quantize(original: Path, name: str, threads: int, importance: Path | None = None) -> Path:
    """Write a file of another type, by llama.cpp's own quantizer."""
    target = original.with_name(f"{name}{'-imatrix' if importance else ''}.gguf")
    if target.exists():
        return target
    code = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if code is None:
        known = sorted(key.removeprefix("LLAMA_FTYPE_MOSTLY_") for key in dir(llama_cpp) if "FTYPE_MOSTLY" in key)
        raise SystemExit(f"error: no type is named {name}; choose from {', '.join(known)}.")
    partial = target.with_suffix(".part")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = code, threads
    if importance is not None:
        params.imatrix, _held = importance_data(importance)
    failed = llama_cpp.llama_model_quantize(os.fsencode(original), os.fsencode(partial), params)
    if failed:
        partial.unlink(missing_ok=True)
        raise SystemExit(f"error: {original}: not quantized to {name}: {last_words()}")
    partial.rename(target)
    return target


def describe(path: Path) -> dict[str, Any]:
    """Say what a file really holds: types with count and bytes, and the bytes that one decoded token reads."""
    types: dict[str, str] = {}
    held: dict[str, dict[str, list[int]]] = {"linears": {}, "token_embd": {}, "output": {}, "norms": {}}
    weights = 0
    for tensor in gguf.GGUFReader(path).tensors:
        stem = tensor.name.removesuffix(".weight")
        part = stem if stem in held else "norms" if len(tensor.shape) == 1 else "linears"
        types[tensor.name] = tensor.tensor_type.name
        cell = held[part].setdefault(tensor.tensor_type.name, [0, 0])
        cell[0] += 1
        cell[1] += int(tensor.n_bytes)
        weights += int(tensor.n_elements) if part == "linears" else 0
    total = {part: sum(size for _, size in types.values()) for part, types in held.items()}
    head = total["output"] or total["token_embd"]
    return {
        "tensors": {part: types for part, types in held.items() if types},
        "types": types,
        "tied": not held["output"],
        "bits_per_linear_weight": round(8 * total["linears"] / weights, 4),
        "bytes": total["linears"] + total["norms"] + head,
        "bytes_per_token": total["linears"] + head,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--types", nargs="*", default=["Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "Q8_0"])
    parser.add_argument("--importance", type=Path, help="mean squares of inputs, as gguf_weights.py reads them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        raise SystemExit(f"error: {options.model}: no config.json; a Hugging Face model directory is needed.")
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    options.out.mkdir(parents=True, exist_ok=True)
    original = write_original(options.model, options.out)
    print(json.dumps({"file": str(original), "type": original.stem, **describe(original)}), flush=True)
    for name in options.types:
        path = quantize(original, name, options.threads, options.importance)
        print(json.dumps({"file": str(path), "type": name, **describe(path)}), flush=True)


if __name__ == "__main__":
    main()
