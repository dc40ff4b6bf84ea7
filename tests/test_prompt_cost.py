"""Models whose prompts 8 bits do not hold: publishing finds out, the directory says so, and the engine reads their prompts in float."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from bitpress import native
from bitpress.checkpoints.compressed import MANIFEST_NAME
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.native.assemble import load_engine
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.opening import load_native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")
LIMIT = 0.002


def write_model(root: Path, tokenizer: Any, spread: float, gain: float) -> Path:
    """Write a random Gemma 3 whose norms' weights spread as exp(spread * normal), and whose products keep `gain` of a norm."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data = 2 * torch.exp(spread * torch.randn(parameter.shape)) - 1
            else:
                parameter.data = torch.randn(parameter.shape) * parameter.shape[1] ** -0.5 * gain
    model.to(torch.bfloat16).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return publish(tmp_path_factory.mktemp("hard"), tiny_tokenizer, 1.5, 1.0)


def publish(root: Path, tokenizer: Any, spread: float, gain: float) -> Path:
    source = write_model(root / "source", tokenizer, spread, gain)
    recipe = make_recipe({"weights": "int4-g32", "quantizer": {"name": "rtn"}})
    quantize_directory(source, root / "out", recipe, proof=Proof(tokens=512, length=128))
    return root / "out"


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_hard_model_reads_its_prompts_in_float(hard: Path) -> None:
    assert json.loads((hard / MANIFEST_NAME).read_text())["prompt_cost"] > LIMIT
    tokens = torch.randint(0, 100, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = load_engine(hard, EngineOptions(activations="none", head="keep")).forward(tokens, "all")
    rounded = load_engine(hard, EngineOptions(activations="int8", head="keep")).forward(tokens, "all")
    usual = load_engine(hard, EngineOptions(head="keep"))
    assert usual.facts["activations"] == "mixed"
    if usual.facts["path"] != "amx":
        assert divergence(exact, rounded) > LIMIT
    assert divergence(exact, usual.forward(tokens, "all")) < LIMIT / 10


def test_the_report_and_a_kept_layout_say_so(hard: Path) -> None:
    report = json.loads((hard / "report.json").read_text())
    assert report["figures"]["runtime"]["settings"]["activations"] == "mixed"
    for _ in range(2):  # laid out, then mapped
        facts = load_native(hard).facts
        assert (facts["activations"], facts["prompt_cost"] > LIMIT) == ("mixed", True)


def test_an_easy_model_keeps_8_bits(tmp_path: Path, tiny_tokenizer: Any) -> None:
    out = publish(tmp_path, tiny_tokenizer, 0.1, 0.02)
    assert "prompt_cost" not in json.loads((out / MANIFEST_NAME).read_text())
    assert load_engine(out).facts["activations"] == "int8"


def test_mixed_is_float_in_prompts_and_bytes_in_single_tokens(hard: Path) -> None:
    tokens = list(range(2, 42))
    engines = {
        name: load_engine(hard, EngineOptions.of({"activations": name, "head": "keep"})) for name in ("none", "int8", "mixed")
    }
    prompts = {name: engine.forward(tokens, "all") for name, engine in engines.items()}
    bf16_tiles = engines["mixed"].facts["path"] == "amx"
    assert torch.equal(prompts["mixed"], prompts["int8" if bf16_tiles else "none"])
    for engine in engines.values():
        engine.reset()
    single = {name: torch.cat([engine.forward([token]) for token in tokens[:8]]) for name, engine in engines.items()}
    assert torch.equal(single["mixed"], single["int8"])
    assert not torch.equal(single["mixed"], single["none"])
