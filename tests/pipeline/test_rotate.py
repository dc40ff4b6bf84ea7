"""A rotated model from plan to published directory: nothing is left for run time, tied matrices are two, and every road reads the same."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bitpress
from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint, config_marks
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import Variant
from bitpress.errors import CheckpointError, UsageError
from bitpress.models.opening import open_original
from bitpress.models.walk import Stream, walk
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_method
from bitpress.transforms.rotate import Rotate

TOKENS = torch.tensor([[3, 90, 17, 200, 41, 5, 77, 90]])


class Stopping(Silent):
    """Breaks off after a number of units."""

    def __init__(self, left: int) -> None:
        self.left = left

    def advance(self, unit: str, **figures: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def logits(path: Path, rotate: Rotate | None) -> torch.Tensor:
    model, _ = open_original(path, torch.float32, rotate)
    model.load_outer_()
    stream = Stream(model, [TOKENS])
    stream.start_()
    walk(model, [stream])
    return model.outputs(TOKENS, stream.states[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_streamed_model_is_the_same_in_another_basis(
    architecture: str, tied: bool, tiny_model: Callable[..., Path]
) -> None:
    path = tiny_model(architecture, tie_word_embeddings=tied)
    before, after = logits(path, None), logits(path, Rotate(seed=3))
    assert not torch.equal(before, after)
    # Weights are rounded once, to float32: relative errors of 2^-25 in some forty weights, as random as they are.
    assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_a_published_model_is_rotated_and_has_no_maps(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path, out = tiny_model("llama", tie_word_embeddings=True), tmp_path / "out"
    recipe = gptq_recipe(weights="int8-g16-zero", transforms=["rotate"], compute="fp32", head="int8-row")
    report = quantize_directory(path, out, recipe, proof=Proof(tokens=128, length=32))
    assert report["figures"]["kl_mean"] < 1e-3
    assert [note["weight"] for note in report["notes"]] == ["lm_head"]
    assert "one matrix in the source (tied) and two" in report["notes"][0]["what"]
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False} | config_marks()
    checkpoint = CompressedCheckpoint.open(out)
    assert checkpoint.manifest.aliases == {}
    assert all(r.spec["input_map"] is None and r.spec["output_map"] is None for r in checkpoint.manifest.weights.values())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    norms = [p for name, p in loaded.named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all(bool((p == 1).all()) for p in norms)
    with torch.no_grad():
        says, said = loaded(TOKENS).logits, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits
    assert (says - said).abs().max() < 0.05 * said.abs().max()  # 8 bits
    if native.available():
        assert report["figures"]["runtime"]["name"] == "native"
        assert report["figures"]["runtime"]["kl_mean"] < 1e-2


def test_the_plan_knows_the_bytes_and_says_what_grows(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model("llama", tie_word_embeddings=True)
    values = {"weights": "int4-g16", "quantizer": "rtn", "compute": "fp32"}
    plain, _, _ = plan_run(path, make_method({**values, "transforms": []}))
    plan, model, loader = plan_run(path, make_method({**values, "transforms": ["rotate"]}))
    table = model.model.get_parameter("lm_head.weight").numel() * 4
    assert plan.kept_bytes == plain.kept_bytes + table
    assert dict(plan.untied) == plan.as_dict()["untied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert plan.given_bytes == plain.given_bytes
    report = quantize_directory(
        path, tmp_path / "out", make_method({**values, "transforms": ["rotate"]}), proof=Proof(tokens=0)
    )
    assert report["size"]["bytes_kept"] == plan.kept_bytes
    values_only, _, own = plan_run(path, make_method({**values, "transforms": [{"name": "rotate", "residual": False}]}))
    assert (values_only.kept_bytes, own.aliases) == (plain.kept_bytes, {"lm_head.weight": "model.embed_tokens.weight"})
    assert loader.aliases == {}


def test_a_broken_run_ends_in_the_same_bytes(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_model("llama", tie_word_embeddings=True)
    recipe = gptq_recipe(transforms=["rotate", {"name": "awq-scale", "run_time": False}], head="int8-row")
    quantize_directory(path, tmp_path / "whole", recipe, proof=Proof(tokens=0))
    with pytest.raises(KeyboardInterrupt):
        quantize_directory(path, tmp_path / "broken", recipe, proof=Proof(tokens=0), progress=Stopping(2))
    quantize_directory(path, tmp_path / "broken", recipe, proof=Proof(tokens=0))
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()


def test_a_comparison_judges_a_rotated_model_against_the_original(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    path = tiny_model("llama", tie_word_embeddings=True)
    calibration = {"text": str(text_file), "samples": 4, "length": 32, "inputs": "original"}
    values = {"weights": "int8-g16-zero", "quantizer": "gptq", "compute": "fp32", "calibration": calibration}
    methods = {
        "plain": make_method({**values, "transforms": []}),
        "rotate": make_method({**values, "transforms": ["rotate"]}),
        "rounded": make_method({**values, "quantizer": "rtn", "transforms": ["rotate"]}),
    }
    variants = [Variant(name, 8, method) for name, method in methods.items()]
    texts = {"text": "builtin:heldout:speeches"}
    found = compare_recipes(
        path, tmp_path / "out", variants, texts, shared=methods["plain"].recipe.calibration, tokens=64, length=32, keep=True
    )
    assert [row["failed"] for row in found["rows"]] == [None, None, None]
    kls = {row["name"]: row["kl_mean"] for row in found["rows"]}
    assert all(0 < kl < 1e-3 for kl in kls.values()), kls
    assert kls["plain"] != kls["rotate"]
    kept = bitpress.evaluate(tmp_path / "out" / "models" / "rotate-8", path, text=texts["text"], tokens=64, length=32)
    assert kept["kl_mean"] == pytest.approx(kls["rotate"], rel=1e-3)


def test_what_cannot_be_rotated_is_said_before_any_work(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    values = {"weights": "int4-g16", "quantizer": "rtn"}
    with pytest.raises(CheckpointError, match=r"gemma3.*: cannot be rotated: .*post_attention_layernorm: its gain"):
        quantize_directory(tiny_model("gemma3"), tmp_path / "out", make_method({**values, "transforms": ["rotate"]}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        UsageError, match="rotate changes the whole network before anything is measured of it, so it goes first"
    ):
        make_method({**values, "transforms": ["hadamard", "rotate"]})
    with pytest.raises(UsageError, match="goes first, and once"):
        make_method({**values, "transforms": ["rotate", {"name": "rotate", "seed": 1}]})
    with pytest.raises(UsageError, match="dfloat11 keeps weights bit for bit, and rotate would change them"):
        make_method({"weights": "dfloat11", "transforms": ["rotate"]})


def test_a_given_rotation_is_recorded_and_another_file_does_not_resume(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path, file, out = tiny_model("llama"), tmp_path / "R.safetensors", tmp_path / "out"

    def write(seed: int) -> None:
        made = [torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0] for n in (32, 16)]
        save_file({"residual": made[0].contiguous(), "values": made[1].contiguous()}, file)

    def method() -> Any:
        rotate = {"name": "rotate", "kind": "given", "tensors": str(file)}
        return make_method({"weights": "int8-g16-zero", "quantizer": "rtn", "compute": "fp32", "transforms": [rotate]})

    write(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_directory(path, out, method(), proof=Proof(tokens=0), progress=Stopping(2))
    write(2)
    with pytest.raises(UsageError, match=r"unfinished job that differs in recipe\.transforms"):
        quantize_directory(path, out, method(), proof=Proof(tokens=0))
    write(1)
    report = quantize_directory(path, out, method(), proof=Proof(tokens=128, length=32))
    assert report["figures"]["kl_mean"] < 1e-2
    recorded = CompressedCheckpoint.open(out).manifest.job["recipe"]["transforms"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(part["tensors"], part["sha256"]) for part in recorded] == [("R.safetensors", digest)]
    before, after = logits(path, None), logits(path, Rotate(kind="given", tensors=str(file)))
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    plain = make_method({"weights": "int4-g16", "quantizer": "rtn", "transforms": ["rotate"]}).resolved()
    assert "tensors" not in plain["transforms"][0]  # recipes of before have no such keys
