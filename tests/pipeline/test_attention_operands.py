"""Queries, keys, values and probabilities of attention that are rounded: stored, computed alike on every road, refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma2ForCausalLM

import bitpress
from bitpress import native
from bitpress.checkpoints.compressed import MANIFEST_NAME, CompressedCheckpoint
from bitpress.cli.reports import describe_directory
from bitpress.errors import CheckpointError, FormatError, KernelUnavailable, UsageError
from bitpress.formats import OPERANDS, ActivationFormat, AttentionOperands, parse_format
from bitpress.models.attention import forget_attention_, listen_, round_attention_
from bitpress.models.opening import open_streamed
from bitpress.models.walk import Stream, walk
from bitpress.pipeline.exporting import export_model
from bitpress.recipes import build_method, make_recipe, told_weights

TOKENS = torch.arange(6, 38).reshape(2, 16)
STATIC = {"format": "int8-tensor", "parameters": "static"}
ALL_DYNAMIC = {"queries": "int8-row", "keys": "int4-g8", "values": "int4-row-zero", "probabilities": "int8-row"}
ALL_STATIC = {"queries": STATIC, "keys": STATIC, "values": {**STATIC, "format": "int8-tensor-zero"}, "probabilities": STATIC}


def quantize(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    recipe = {"weights": "int8-row", "quantizer": "rtn", "calibration": {"samples": 2, "length": 32}, **keys}
    return bitpress.quantize(model, out, recipe=recipe, proof_tokens=0)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS, **inputs: Any) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


@torch.no_grad()
def streamed(path: Path) -> torch.Tensor:
    model = open_streamed(path, torch.float32)
    model.load_outer_()
    stream = Stream(model, [TOKENS])
    stream.start_()
    walk(model, [stream])
    return model.outputs(TOKENS, stream.states[0])


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", ALL_DYNAMIC),
        ("llama", ALL_STATIC),
        ("gpt2", {"keys": "mxfp4-g8-e8m0", "values": {"format": "e2m1-g8-fp8", "parameters": "local"}}),
    ],
)
def test_every_road_computes_the_rounded_attention_to_the_bit(
    family: str, keys: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny_model(family), out, **keys)
    checkpoint = CompressedCheckpoint.open(out)
    assert len(checkpoint.operands) == 2
    for operands in checkpoint.load_attention().values():
        assert operands.spec().keys() == keys.keys()
    models = {weights: bitpress.load(out, weights=weights, dtype="fp32") for weights in ("decoded", "packed")}
    models["transformers"] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    got = {name: logits(model) for name, model in models.items()} | {"streamed": streamed(out)}
    assert all(torch.equal(value, got["decoded"]) for value in got.values())
    forget_attention_(models["packed"])
    without = logits(models["packed"])
    assert not torch.allclose(got["decoded"], without, rtol=0, atol=1e-4)
    assert torch.allclose(got["decoded"], without, rtol=0, atol=0.5)  # rounded, and not another model
    for model in models.values():
        with pytest.raises(UsageError, match="is not saved"):
            model.save_pretrained(tmp_path / "saved")


def test_fine_operands_are_those_of_the_model_itself(tiny_model: Callable[..., Path]) -> None:
    """Formats of many bits change next to nothing, whichever of the two roads an attention takes, and behind any mask."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    padding = torch.ones_like(TOKENS)
    padding[1, :5] = 0
    for inputs in ({}, {"attention_mask": padding}):
        before = logits(model, **inputs)
        for name in OPERANDS:
            fine = AttentionOperands(**{name: ActivationFormat(parse_format("int8-row-fp32"))})
            other = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
            round_attention_(other, {f"model.layers.{i}.self_attn": fine for i in range(2)})
            after = logits(other, **inputs)
            seen = padding.bool() if inputs else torch.ones_like(TOKENS).bool()
            assert not torch.equal(after[seen], before[seen])
            assert float((after - before)[seen].abs().max()) < 0.02 * float(before[seen].abs().max()), name


def test_the_next_block_sees_what_rounded_attention_makes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    codes = {}
    for keys in ({}, {"keys": "int2-row"}):
        out = tmp_path / str(len(keys))
        quantize(tiny_model("llama"), out, weights="int4-g32", quantizer="gptq", **keys)
        checkpoint = CompressedCheckpoint.open(out)
        codes[len(keys)] = [checkpoint.read_weight(f"model.layers.{i}.mlp.up_proj.weight").dequantize() for i in (0, 1)]
    assert torch.equal(codes[0][0], codes[1][0])
    assert not torch.equal(codes[0][1], codes[1][1])


@torch.no_grad()
def test_a_token_after_the_other_gives_what_all_give_at_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, **ALL_DYNAMIC)
    model = bitpress.load(out, dtype="fp32")
    cache = DynamicCache(config=model.config)
    rows = [model(input_ids=TOKENS[:, at : at + 1], cache=cache).logits for at in range(TOKENS.shape[1])]
    whole = logits(model)
    # Sums in another order: far below one step of a code, whose smallest here is 1 / 127 of a row.
    assert float((torch.cat(rows, 1) - whole).abs().max()) < 1e-4 * float(whole.abs().max())


def test_static_parameters_are_those_of_the_operands_that_the_block_sees(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, **ALL_STATIC)
    found = CompressedCheckpoint.open(out).load_attention()
    scales = {
        name: {key: float(t.max()) for key, t in own.tensors().items() if key.endswith("scale")} for name, own in found.items()
    }
    first, second = scales.values()
    assert first.keys() == {f"{name}.scale" for name in OPERANDS}
    assert first["probabilities.scale"] == pytest.approx(1 / 127, rel=1e-3)  # the first token sees itself alone
    assert first["keys.scale"] != pytest.approx(second["keys.scale"], rel=1e-3)


def test_a_recipe_with_operands_is_spelled_out_and_read_again() -> None:
    said = {"keys": "INT8_ROW", "values": {**STATIC, "observer": "Percentile"}, "queries": "keep"}
    method = build_method(make_recipe(said, ["keys.format=int4-row"]))
    resolved = method.resolved()
    assert resolved["values"] == {**STATIC, "observer": {"name": "percentile", "keep": 99.99}}
    assert resolved["keys"] == {"format": "int4-row", "parameters": "dynamic"}
    assert not {"queries", "probabilities"} & resolved.keys()
    assert build_method(make_recipe(resolved)).resolved() == resolved
    assert "keys int4-row dynamic (simulated)" in told_weights(resolved)
    assert not set(OPERANDS) & build_method(make_recipe({})).resolved().keys()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"keys": "int8-tensor"}, "tokens would share dynamic parameters"),
        ({"probabilities": "int8-g16"}, "as many as there are tokens"),
        ({"probabilities": "ternary-row"}, "depend on how many probabilities are 0"),
        ({"probabilities": "gauss4-row"}, "depend on how many probabilities are 0"),
        ({"values": {**STATIC, "observer": "output"}}, "values: output looks at inputs of linear layers"),
        ({"probabilities": {**STATIC, "observer": "channel-percentile"}}, "probabilities: channel-percentile looks at inputs"),
        ({"values": {"format": "int8-row", "observer": "mse"}}, "an observer chooses static parameters"),
        ({"values": {"format": "int8-row", "observers": "mse"}}, "values.observers: unknown key of values"),
        ({"query": "int8-row"}, "Did you mean 'queries'"),
    ],
)
def test_operands_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises((FormatError, UsageError), match=says):
        make_recipe(keys)


def test_what_an_attention_cannot_round_is_refused_by_the_plan(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"keys int8-g48 dynamic: .*not a multiple of 48.*self_attn.*leave them out"):
        quantize(tiny_model("llama"), tmp_path / "out", keys="int8-g48")
    with pytest.raises(CheckpointError, match=r"Gemma2.*in a way of its own \(eager\).*leave them out"):
        listen_(Gemma2ForCausalLM(Gemma2Config(vocab_size=8, hidden_size=8, num_hidden_layers=0)))
    assert not (tmp_path / "out").exists()


def test_what_does_not_round_attention_refuses_the_directory(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, keys="int8-row", values=STATIC)
    with pytest.raises(UsageError, match=r"self_attn rounds its operands, which no other tool's files say"):
        export_model(out, tmp_path / "ct", "compressed-tensors")
    with pytest.raises(CheckpointError, match="quantize the original model"):
        bitpress.quantize(out, tmp_path / "again", requantize=True, proof_tokens=0)
    told = describe_directory(out)["attention"]
    assert told == {"keys int8-row dynamic (simulated)": 2, "values int8-tensor static (simulated)": 2}
    if native.available():
        with pytest.raises(
            KernelUnavailable, match=r"attention of model\.layers\.0\.self_attn rounds its operands.*runtime transformers"
        ):
            bitpress.load(out, runtime="native")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"model.layers.0.self_attn": {"keys": {"format": "int8-row"}}}, "no more and no less"),
        (
            {"model.layers.0.self_attn": {"query": {"format": "int8-row", "parameters": "dynamic"}}},
            "unknown operand of an attention",
        ),
        ({"model.layers.0.self_attn": {"keys": STATIC}}, r"keys\.scale' is missing"),
        ({"model.layers.9.self_attn": {"keys": {"format": "int8-row", "parameters": "dynamic"}}}, "has no module"),
        (
            {"model.layers.0.self_attn": {"probabilities": {"format": "binary-row", "parameters": "dynamic"}}},
            "how many probabilities",
        ),
    ],
)
def test_a_manifest_that_is_wrong_about_operands_is_refused(
    spec: dict[str, Any], says: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantize(tiny_model("llama"), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention": spec}))
    with pytest.raises(CheckpointError, match=says):
        bitpress.load(tmp_path / "out", dtype="fp32")


def test_a_recipe_says_how_its_products_are_computed() -> None:
    def told(**keys: Any) -> str:
        return told_weights(build_method(make_recipe({"weights": "int8-row", "inputs": "int8-row-fp32", **keys})).resolved())

    assert told() == "int8-row; inputs int8-row-fp32 dynamic (integer products)"
    assert told(weights="nf4-g64") == "nf4-g64; inputs int8-row-fp32 dynamic (simulated)"
    assert "(simulated)" in told(transforms=["shift"])
    assert told(keys="int8-row-fp32").count("(simulated)") == 2
