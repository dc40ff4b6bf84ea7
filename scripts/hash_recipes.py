"""Print one hash a recipe of what it stores for a tiny random model: the same before and after a change that alters no behaviour.

    python scripts/hash_recipes.py > before.txt; ...; python scripts/hash_recipes.py | diff before.txt -

Hashes hold on one machine class and thread count, as all results do.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import bitpress

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rtn nf4": {"weights": "nf4-g32", "quantizer": {"name": "rtn"}},
    "awq": {"weights": "int4-g32-zero", "quantizer": {"name": "awq"}},
    "hadamard + ldlq": {
        "weights": "int3-g32-zero",
        "transforms": [{"name": "balance"}, {"name": "hadamard"}],
        "quantizer": {"name": "ldlq", "passes": 3},
    },
    "qep, sequential": {
        "weights": "int3-g32-zero",
        "transforms": [{"name": "hadamard"}, {"name": "qep"}],
        "quantizer": {"name": "gptq"},
        "calibration": {"sequential": True},
    },
    "gptaq": {"weights": "int3-g32-zero", "quantizer": {"name": "gptaq"}},
    "boa, original inputs": {
        "weights": "int3-g32-zero",
        "quantizer": {"name": "boa"},
        "calibration": {"inputs": "original"},
    },
    "spqr": {"weights": "int4-g16-zero-s4", "quantizer": {"name": "spqr"}},
    "quip_sharp": {"weights": "e8p-row", "quantizer": {"name": "quip_sharp", "residual": "e8p"}},
    "aqlm": {"weights": "aq2x6x4-row", "quantizer": {"name": "aqlm"}},
    "squeezellm": {"weights": "kmeans3-row", "quantizer": {"name": "squeezellm"}},
    "pb_llm": {"weights": "binary-g32", "quantizer": {"name": "pb_llm"}},
    "ptqtp": {"weights": "trits2-g32", "quantizer": {"name": "ptqtp"}},
    "bitstack": {"weights": "binary-tensor", "quantizer": {"name": "bitstack", "terms": 2, "rank": 4}},
    "gptq + lqer + outliers": {
        "weights": "int4-g32-zero",
        "quantizer": {"name": "gptq"},
        "corrections": [{"name": "outliers"}, {"name": "lqer", "rank": 4}],
    },
    "overrides": {
        "weights": "int2-g32-zero",
        "quantizer": {"name": "aligned_groups"},
        "overrides": [
            {"match": "*.down_proj", "weights": "int4-g32", "quantizer": {"name": "rsq"}},
            {"match": "*.0.*", "weights": "mxfp4", "quantizer": {"name": "mr_gptq"}},
        ],
        "skip": ["*.v_proj"],
    },
}


def write_model(root: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(root)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
    return root


def hashed(out: Path) -> str:
    manifest = json.loads((out / "bitpress.json").read_text(encoding="utf-8"))
    files = {name: record["sha256"] for name, record in manifest["files"].items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps([files, manifest["weights"]], sort_keys=True).encode()).hexdigest()[:24]


def main() -> None:
    small = {"samples": 16, "length": 128}
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder) / "source")
        for name, recipe in RECIPES.items():
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            keys = {**recipe, "calibration": {**recipe.get("calibration", {}), **small}}
            bitpress.quantize(source, Path(folder) / "out", recipe=keys, force=True, proof_tokens=0)
            print(f"{hashed(Path(folder) / 'out')}  {name}", flush=True)


if __name__ == "__main__":
    main()
