"""A published model runs the same way however it is opened: decoded, packed, by transformers, or as the original with other weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import bitpress
from bitpress.checkpoints.compressed import MANIFEST_NAME, CompressedCheckpoint
from bitpress.errors import CheckpointError, UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.hf.layers import PackedWeight

ARCHITECTURES = ("llama", "mixtral", "gpt2", "opt", "gemma3", "phi3", "qwen3_moe", "jetmoe", "llama4")
TOKENS = torch.arange(6, 38).reshape(2, 16)


@pytest.fixture(scope="module")
def compressed(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return an architecture's original and its int4-g16 by plain rounding, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def press(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            source, out = tiny_model(architecture), tmp_path_factory.mktemp("loading") / architecture
            recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
            quantize_directory(source, out, recipe, proof=Proof(tokens=0))
            made[architecture] = source, out
        return made[architecture]

    return press


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def with_decoded_weights(source: Path, out: Path) -> Any:
    """The original model, its compressed weights replaced by what they decode to."""
    model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    checkpoint = CompressedCheckpoint.open(out)
    values = checkpoint.load("")
    assert set(checkpoint.manifest.weights) <= set(values)
    left = model.load_state_dict(values, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == set(checkpoint.manifest.aliases)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_to_open_a_model_gives_the_same_logits(
    architecture: str, compressed: Callable[[str], tuple[Path, Path]]
) -> None:
    source, out = compressed(architecture)
    replaced = with_decoded_weights(source, out)
    expected = logits(replaced)
    original = logits(AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager"))
    assert not torch.equal(expected, original), "compression changed nothing: the comparison says nothing"

    decoded = bitpress.load(out)
    assert torch.equal(logits(decoded), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)

    packed = bitpress.load(out, weights="packed")
    assert sum(isinstance(layer, PackedWeight) for layer in packed.modules()) == len(
        CompressedCheckpoint.open(out).manifest.weights
    )
    # Packed and decoded are float32 evaluations of one function and differ in the order of their sums at most. What such an
    # evaluation is off by is measured against float64; another order has errors of the same size, and 8 covers its spread.
    exact = logits(replaced.double())
    bound = 8 * float((expected - exact).abs().max())
    assert 0 < bound < 1e-3
    assert float((logits(packed) - expected).abs().max()) <= bound


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_works_and_packed_is_smaller(architecture: str, compressed: Callable[[str], tuple[Path, Path]]) -> None:
    _, out = compressed(architecture)
    decoded, packed = bitpress.load(out), bitpress.load(out, weights="packed")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    with torch.inference_mode():
        made = [model.generate(TOKENS[:1], **settings) for model in (decoded, packed, theirs)]
    assert made[0].shape == (1, TOKENS.shape[1] + 6)
    assert torch.equal(made[0], made[2])
    assert made[1].shape == made[0].shape
    checkpoint = CompressedCheckpoint.open(out)
    weights = sum(r.spec["shape"][0] * r.spec["shape"][1] for r in checkpoint.manifest.weights.values())
    stored = sum(checkpoint.tensors[name][1].nbytes for names in checkpoint.stored.values() for name in names)
    # The difference is exactly that of the compressed weights: 4 bytes each against what the file holds for them.
    assert held_bytes(decoded) - held_bytes(packed) == 4 * weights - stored
    assert held_bytes(theirs) == held_bytes(decoded)


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_than_was_compressed_is_named(loader: Any, compressed: Callable[[str], tuple[Path, Path]]) -> None:
    _, out = compressed("llama")
    with pytest.raises(CheckpointError, match=r"holds a LlamaForCausalLM.*open it with AutoModelForCausalLM"):
        loader.from_pretrained(out)


@pytest.mark.parametrize("weights", ["decoded", "packed"])
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])  # biases; experts
def test_a_model_changes_its_type_as_a_whole(
    architecture: str, weights: str, compressed: Callable[[str], tuple[Path, Path]]
) -> None:
    _, out = compressed(architecture)
    model = bitpress.load(out, weights=weights).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    codes = [b for name, b in model.named_buffers() if name.endswith(".codes")]
    scales = [b for name, b in model.named_buffers() if name.endswith("term0.scale")]
    assert bool(codes) == (weights == "packed")
    assert {t.dtype for t in codes} <= {torch.uint8}
    assert {t.dtype for t in scales} <= {torch.float16}, "the type of stored scales is part of the format"
    if architecture == "gpt2":  # it has no rotary frequencies, which `to` rounds and loading in that type does not
        assert torch.equal(logits(model), logits(bitpress.load(out, weights=weights, dtype="bf16")))


def test_the_type_is_the_originals_where_the_configuration_is_silent(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama", dtype="bfloat16"), source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
    quantize_directory(source, tmp_path / "out", recipe, proof=Proof(tokens=0))
    ours, theirs = bitpress.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(logits(ours), logits(theirs))


def test_the_generation_settings_are_the_originals(compressed: Callable[[str], tuple[Path, Path]]) -> None:
    _, out = compressed("llama")
    ours, theirs = bitpress.load(out).generation_config, AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 1)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)


def test_a_copied_directory_is_the_same_model(compressed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, out = compressed("llama")
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").unlink()  # which nothing reads
    assert torch.equal(logits(bitpress.load(tmp_path / "copy")), logits(bitpress.load(out)))


def test_one_model_class_by_name(
    compressed: Callable[[str], tuple[Path, Path]], to_first_version: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Not the automatic class: it gives the configuration no path, so the checks run when the weights are looked for."""
    from transformers import LlamaForCausalLM

    _, out = compressed("llama")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(out)), logits(bitpress.load(out)))
    hostile = tmp_path / "hostile"
    shutil.copytree(out, hostile)
    (hostile / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="there is no"):
        LlamaForCausalLM.from_pretrained(hostile)
    shutil.copytree(out, tmp_path / out.name)
    to_first_version(tmp_path / out.name)
    shutil.copytree(tmp_path / out.name, hostile, dirs_exist_ok=True)
    index = json.loads((hostile / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../{out.name}/{file}" for name, file in index["weight_map"].items()}
    (hostile / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        LlamaForCausalLM.from_pretrained(hostile)


@pytest.mark.parametrize(("option", "value"), [("weights", "packd"), ("dtype", "int8")])
def test_a_wrong_option_is_named(option: str, value: str, compressed: Callable[[str], tuple[Path, Path]]) -> None:
    _, out = compressed("llama")
    with pytest.raises(UsageError, match=value):
        bitpress.load(out, **{option: value})
