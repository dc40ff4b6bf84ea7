"""A model larger than the memory allowed: a synthetic 6 GB checkpoint through rounding and GPTQ.

    make bench Q=stream

Makes a Llama checkpoint with random float32 weights (hidden 2048, intermediate 5632, 32 blocks, vocabulary 49,152: 6.0 GB), presses it
with each method in a process of its own, and prints the peak memory that the run itself reports. Needs 10 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rows import add_row

LIMIT_MB = 2500


def make_checkpoint(target: Path, blocks: int) -> int:
    """Write the checkpoint block by block; give its bytes."""
    from safetensors.torch import save_file

    from bitpress.checkpoints.named import resolve_model

    hidden, inner, vocabulary, kv = 2048, 5632, 49152, 512
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        return sum(t.numel() * 4 for t in tensors.values())

    embedding = torch.randn(vocabulary, hidden, generator=generator) * 0.02
    total = save("model-00000.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)})
    for i in range(blocks):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{n}.weight": torch.randn(s, generator=generator) * s[1] ** -0.5 for n, s in shapes.items()}
        tensors |= {f"{prefix}{n}.weight": torch.ones(hidden) for n in ("input_layernorm", "post_attention_layernorm")}
        total += save(f"model-{i + 1:05d}.safetensors", tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (target / "config.json").write_text(json.dumps(config))
    source = resolve_model("smollm2-135m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return total


def press(model: Path, out: Path, method: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitpress", "quantize", str(model), str(out), "--quantizer", method, "--json"]
    command += ["--samples", "16", "--length", "128", "--proof-tokens", "512", "--set", "quantizer.clip=minmax"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    run = report["run"]
    return {
        "method": method,
        "weights": report["job"]["recipe"]["weights"],
        "bytes": report["size"]["bytes"],
        "seconds": run["seconds"],
        "seconds_pressing": run["seconds_pressing"],
        "peak_memory_mb": round(run["peak_memory_bytes"] / 1e6),
        "fallbacks": len(report["fallbacks"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        size = make_checkpoint(model, options.blocks)
        for method in options.methods:
            row = {"checkpoint_bytes": size, **press(model, Path(name) / method, method)}
            add_row("stream", row)
            verdict = "within" if row["peak_memory_mb"] < LIMIT_MB else "ABOVE"
            print(
                f"{method}: {size / 1e9:.2f} GB in {row['seconds']:.0f} s, peak {row['peak_memory_mb']} MB, {verdict} {LIMIT_MB} MB"
            )


if __name__ == "__main__":
    main()
