"""Small GGUF files of random blocks, by the `gguf` package's writer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from bitpress.exchange.gguf_blocks import BLOCK_TYPES, Bits, Raw

__all__ = ["random_bytes", "write_llama"]

LLAMA_SIZES = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "kv": 2, "vocabulary": 40}


def write_llama(path: Path, changes: dict[str, tuple[str, ...]] | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Write a small Llama of random blocks; return the bytes of every tensor. `changes`: tensor -> the type of its blocks."""
    sizes = {**LLAMA_SIZES, **options}
    hidden, inner, heads, kv = sizes["hidden"], sizes["inner"], sizes["heads"], sizes["kv"]
    writer = gguf.GGUFWriter(path, options.get("architecture", "llama"), split_max_tensors=options.get("split", 0))
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    if options.get("experts"):
        writer.add_expert_count(options["experts"])
        writer.add_expert_used_count(2)
    if options.get("tokenizer"):
        writer.add_tokenizer_model(options["tokenizer"])
    made: dict[str, torch.Tensor] = {}
    numbers = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: str = "F32") -> None:
        kind = (changes or {}).get(name, (kind,))[0]
        if kind == "F32":
            values = (numbers.standard_normal(shape) * 0.1).astype(np.float32)
            writer.add_tensor(name, values)
            made[name] = torch.from_numpy(values)
            return
        blocks = BLOCK_TYPES[kind]
        rows = int(np.prod(shape[:-1]))
        raw = random_bytes(kind, rows, shape[-1] // blocks.weights)
        writer.add_tensor(name, raw.view(*shape[:-1], -1).numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        made[name] = raw

    add("token_embd.weight", sizes["vocabulary"], hidden, kind="Q8_0")
    add("output_norm.weight", hidden)
    for i in range(sizes["layers"]):
        add(f"blk.{i}.attn_norm.weight", hidden)
        add(f"blk.{i}.attn_q.weight", hidden, hidden, kind="Q4_0")
        add(f"blk.{i}.attn_k.weight", hidden * kv // heads, hidden, kind="Q4_1")
        add(f"blk.{i}.attn_v.weight", hidden * kv // heads, hidden, kind="IQ4_NL")
        add(f"blk.{i}.attn_output.weight", hidden, hidden, kind="Q5_0")
        add(f"blk.{i}.ffn_norm.weight", hidden)
        if options.get("experts"):
            add(f"blk.{i}.ffn_gate_inp.weight", options["experts"], hidden)
            for name, *shape in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                add(f"blk.{i}.ffn_{name}_exps.weight", options["experts"], *shape, kind="Q8_0")
        else:
            add(f"blk.{i}.ffn_gate.weight", inner, hidden, kind="Q5_1")
            add(f"blk.{i}.ffn_up.weight", inner, hidden, kind="MXFP4")
            add(f"blk.{i}.ffn_down.weight", hidden, inner, kind="Q8_0")
    for name in options.get("extra", ()):
        add(name, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def random_bytes(name: str, rows: int = 3, across: int = 4) -> torch.Tensor:
    """Rows of blocks of any bytes, whose float16 numbers are finite and whose codes stand for something."""
    kind = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(kind.number)
    raw = torch.randint(0, 256, (rows * across, kind.nbytes), generator=generator, dtype=torch.uint8)
    at = 0
    for field in kind.fields:
        part = raw[:, at : at + field.nbytes]
        if isinstance(field, Raw) and field.nbytes == 2:  # exponents below those of infinities
            part[:, 1] &= 0xBF
        elif isinstance(field, Raw):
            part &= 0x7F
            part[part == 0x7F] = 1
        elif isinstance(field, Bits) and name == "TQ2_0":
            part &= 0x55
        elif name == "TQ1_0":
            part[:] = (part.int() % 243 * 256 + 242).div(243, rounding_mode="floor").to(torch.uint8)
            part[:, 48:] = (part[:, 48:].int() % 81 * 3 * 256 + 242).div(243, rounding_mode="floor").to(torch.uint8)
        at += field.nbytes
    return raw.view(rows, -1)
