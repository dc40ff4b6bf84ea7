"""A Llama of 1.1 billion random weights from a fixed seed: for timing a shape that no package index carries.

    python benchmarks/random_llama.py ~/.cache/bitpress/benchmarks/llama-1.1b-random

Writes a Hugging Face directory: bfloat16 normals of deviation 0.02, norms of one, and a byte-level tokenizer of 32,000 entries.
Tensors are drawn and written one at a time, below 1 GB of memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
END = "<|endoftext|>"


def shapes() -> dict[str, tuple[int, ...]]:
    """List every tensor in the order of the file."""
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    q, kv = CONFIG["num_attention_heads"] * CONFIG["head_dim"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = {f"model.layers.{i}.{name}": shape for i in range(CONFIG["num_hidden_layers"]) for name, shape in block.items()}
    rest = {"model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return {f"{name}.weight": shape for name, shape in {"model.embed_tokens": (vocabulary, hidden), **layers, **rest}.items()}


def write_weights(path: Path, seed: int) -> int:
    """Write the safetensors file; give its weights."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes().items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes().values():
            w = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).mul_(0.02)
            w.to(torch.bfloat16).view(torch.uint8).numpy().tofile(file)
    return offset // 2


def write_tokenizer(target: Path) -> None:
    """Write a tokenizer with one token a byte; the entries above these only name the ids that the model can produce."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    size = CONFIG["vocab_size"]
    words = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{number}>" for number in range(len(words), size)]
    tokenizer = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "model_max_length": 2048}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(options.out)
    partial = options.out / "model.safetensors.part"
    weights = write_weights(partial, options.seed)
    partial.rename(options.out / "model.safetensors")
    print(f"{options.out}: {weights / 1e9:.3f} billion weights")


if __name__ == "__main__":
    main()
