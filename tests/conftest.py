"""Tiny models for every test: random weights under fixed seeds, a tokenizer trained here, nothing downloaded."""

import functools
import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["BITPRESS_LAYOUTS"] = "off"  # what a test loads is laid out anew; tests of kept layouts have a folder of their own
os.environ.setdefault("BITPRESS_DEVICE", "cpu")  # a test that is not marked gpu means the processor, whatever is there

import array_checks
import pytest
import typer.main

# Typer builds all commands anew at every call, which is a third of a call that is refused. Nothing changes an app once it is made.
typer.main.get_command = functools.cache(typer.main.get_command)

if (
    "bitpress" not in sys.modules
):  # every process of xdist comes by here; the sanitized run imports it first, with its own library
    array_checks.install("bitpress")

VOCABULARY = 384
CONTEXT = 256

# What makes an architecture small; everything else is its own default.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,  # large enough that the logits differ
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": CONTEXT}),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 64, "attention_chunk_size": 128},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "mamba2": ("Mamba2Config", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
}
_NOT_OF_GPT2 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try a test that takes a `spine` on every architecture, and on what its module adds to these."""
    if "spine" in metafunc.fixturenames:
        metafunc.parametrize("spine", [*_ARCHITECTURES, *getattr(metafunc.module, "MORE_SPINES", ())])


def pytest_collection_finish() -> None:
    """Leave what collection made out of garbage collection: a million objects that stay, passed over again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Silence what transformers says while it loads: warnings are errors here, and bars are noise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _tokenize_once() -> None:
    import tokenized_once

    tokenized_once.install()


@pytest.fixture(scope="session", autouse=True)
def _continue_shortly() -> None:
    """Let every proof continue its prompts by a few tokens: 40 by the original model are a fifth of a tiny model's run."""
    from bitpress.measure import continuations

    continuations.NEW_TOKENS = 6


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text of the package's own, for calibration and for proofs that take no time."""
    from bitpress.calibration import builtin_texts

    text = next(iter(builtin_texts("calibration").values()))
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(text_file: Path) -> Any:
    """A byte-level BPE tokenizer of 384 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_file.read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Make (once) a tiny random model of an architecture: `tiny_model("llama", num_hidden_layers=3)` is its directory.

    The directory is shared: a test that changes it copies it first.
    """
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
        key = json.dumps([architecture, seed, dtype, changes], sort_keys=True)
        if key not in made:
            folder = hashlib.sha256(key.encode()).hexdigest()[:8]
            made[key] = tmp_path_factory.mktemp("tiny") / f"{architecture}-{folder}"
            _save(made[key], architecture, seed, dtype, changes)
            tiny_tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def _save(path: Path, architecture: str, seed: int, dtype: str, changes: dict[str, Any]) -> None:
    import torch
    import transformers

    name, own = _ARCHITECTURES[architecture]
    small = {k: v for k, v in _SMALL.items() if architecture != "gpt2" or k not in _NOT_OF_GPT2}
    config = getattr(transformers, name)(**(small | own | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(path)


@pytest.fixture(scope="session")
def gptq_recipe(text_file: Path) -> Callable[..., Any]:
    """Make a recipe of int4-g32-zero by gptq over a few windows of the short text."""
    from bitpress.recipes import make_recipe

    def make(**values: Any) -> Any:
        calibration = {"text": str(text_file), "samples": 4, "length": 32} | values.pop("calibration", {})
        return make_recipe(
            {"weights": "int4-g32-zero", "quantizer": {"name": "gptq"}, "calibration": calibration, "batch": 2} | values
        )

    return make


@pytest.fixture(scope="session")
def pressed_original(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny llama with tied embeddings in int4-g32-zero, its inputs permuted; shared, so to be read only."""
    from bitpress.pipeline.quantize import Proof, quantize_directory

    out = tmp_path_factory.mktemp("pressed") / "llama"
    recipe = gptq_recipe(quantizer={"name": "gptq", "groups": "running"})
    quantize_directory(tiny_model("llama", tie_word_embeddings=True), out, recipe, proof=Proof(tokens=0))
    return out


@pytest.fixture
def pressed_dir(pressed_original: Path, tmp_path: Path) -> Path:
    """A copy of that model that the test may change."""
    copy = tmp_path / "pressed"
    shutil.copytree(pressed_original, copy)
    return copy


@pytest.fixture(scope="session")
def to_first_version() -> Callable[[Path], Path]:
    """Turn a published directory into one of version 1: weight files under transformers' own names, and an index of them."""
    from bitpress.checkpoints.compressed import MANIFEST_NAME, OUTER_NAME
    from bitpress.checkpoints.durable import hash_file
    from bitpress.checkpoints.safetensors_file import read_header

    def turn(root: Path) -> Path:
        manifest = json.loads((root / MANIFEST_NAME).read_text())
        shards = [OUTER_NAME, *sorted(name for name in manifest["files"] if name.startswith("bitpress-"))]
        weight_map: dict[str, str] = {}
        for i, name in enumerate(shards):
            old = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (root / name).rename(root / old)
            manifest["files"][old] = manifest["files"].pop(name)
            weight_map |= dict.fromkeys(read_header(root / old)[0], old)
        config = json.loads((root / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitpress", "version": 1}
        del config["transformers_weights"]
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        for name, content in {"config.json": config, "model.safetensors.index.json": index}.items():
            (root / name).write_text(json.dumps(content))
            manifest["files"][name] = {"bytes": (root / name).stat().st_size, "sha256": hash_file(root / name)}
        manifest["bitpress"] = 1
        manifest["job"].pop("directory")
        (root / MANIFEST_NAME).write_text(json.dumps(manifest))
        return root

    return turn
