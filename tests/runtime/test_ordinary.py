"""A decoded model is a model of transformers like any other; one on packed weights refuses to leave its directory, in one line."""

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitpress
from bitpress.errors import UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe

# Tied embeddings; experts in one parameter; matrices stored [in, out]; experts in a module's own weight; experts that are never indexed.
ARCHITECTURES = ("llama", "mixtral", "gpt2", "jetmoe", "llama4")
TOKENS = torch.arange(6, 22)[None]
Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def pressed(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return an architecture's original and its int4-row by plain rounding, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def press(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            source = tiny_model(architecture, tie_word_embeddings=architecture == "llama")
            out = tmp_path_factory.mktemp("ordinary") / architecture
            quantize_directory(source, out, make_recipe({"weights": "int4-row", "quantizer": "rtn"}), proof=Proof(tokens=0))
            made[architecture] = source, out
        return made[architecture]

    return press


ROADS: dict[str, Callable[[Path], Any]] = {"load": bitpress.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoded_model_is_made_of_the_originals_own_modules(architecture: str, road: str, pressed: Models) -> None:
    source, out = pressed(architecture)
    original, model = AutoModelForCausalLM.from_pretrained(source), ROADS[road](out)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in original.named_parameters()
    ]
    assert list(model.state_dict()) == list(original.state_dict())
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in original.named_buffers()}
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        assert name not in vars(model), name
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        assert getattr(model, name) == getattr(original, name)
    assert not hasattr(model.config, "quantization_config")
    assert not {"_is_quantized", "transformers_weights"} & set(vars(model.config))
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    if architecture == "llama":
        assert model.lm_head.weight is model.model.embed_tokens.weight, "a tie outlives a change of type"


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoded_model_is_saved_pickled_and_copied(architecture: str, road: str, pressed: Models, tmp_path: Path) -> None:
    model = ROADS[road](pressed(architecture)[1])
    expected = logits(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for again in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(logits(again), expected)
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & set(config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation="eager")
    assert not hasattr(plain, "hf_quantizer")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    # The same values at other addresses: sums may be taken in another order of the vector units.
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_adapters_of_a_decoded_model_are_trained(pressed: Models) -> None:
    model = bitpress.load(pressed("llama")[1])
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is torch.nn.Linear
    model.requires_grad_(False)
    low = torch.nn.Parameter(torch.zeros(layer.out_features, 2))
    high = torch.randn(2, layer.in_features)
    layer.register_forward_hook(lambda _, args, out: out + args[0] @ high.T @ low.T)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert float(low.grad.abs().max()) > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # its own, not ours
def test_peft_takes_a_decoded_model(pressed: Models) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(bitpress.load(pressed("llama")[1]), config)
    before = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), before, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="PackedLinear"):
        peft.get_peft_model(bitpress.load(pressed("llama")[1], weights="packed"), config)


@pytest.mark.parametrize("architecture", ["llama", "llama4"])
def test_a_packed_model_refuses_in_one_line(architecture: str, pressed: Models, tmp_path: Path) -> None:
    model = bitpress.load(pressed(architecture)[1], weights="packed")
    for leave in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: pickle.dumps(model),
        lambda: torch.save(model, io.BytesIO()),
        lambda: copy.deepcopy(model),
    ):
        with pytest.raises(UsageError, match="copy its directory") as caught:
            leave()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_a_packed_parameter_is_what_it_decodes_to(pressed: Models) -> None:
    _, out = pressed("llama4")
    packed = bitpress.load(out, weights="packed").model.layers[0].feed_forward.experts.gate_up_proj
    whole = bitpress.load(out).model.layers[0].feed_forward.experts.gate_up_proj.data
    assert (packed.shape, packed.ndim, len(packed), packed.device) == (whole.shape, whole.ndim, len(whole), whole.device)
    for index in (0, -1, torch.tensor(2), slice(1, 3), torch.tensor([0, 3]), (1, slice(None), 0)):
        assert torch.equal(packed[index], whole[index])
    with pytest.raises(IndexError):
        packed[len(whole)]
    x = torch.randn(len(whole), 3, whole.shape[1])
    assert torch.equal(torch.bmm(x, packed), torch.bmm(x, whole))
    assert torch.equal(x @ packed, x @ whole)
    assert torch.equal(torch.stack([packed, packed]), torch.stack([whole, whole]))
    assert torch.equal(packed.transpose(1, 2), whole.transpose(1, 2))


LEAVING = """
import sys, torch, bitpress
root = sys.argv[1]
packed = bitpress.load(root, weights="packed")
with torch.no_grad():
    packed(input_ids=torch.arange(6, 22)[None])
native = bitpress.load(root, runtime="native")
native.engine.forward([6, 7, 8])
tokens = native.engine.generate([6, 7, 8])
next(tokens)
try:
    native.engine.forward([10**6])
except ValueError as error:
    kept = error
cycle = [packed, native]
cycle.append(cycle)
"""


def test_nothing_is_leaked_at_exit(pressed: Models) -> None:
    """A model on packed weights and an engine in global variables, with what they have made."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(pressed("llama")[1])], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
