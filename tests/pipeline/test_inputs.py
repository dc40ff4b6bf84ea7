"""Inputs of products that are rounded: what a recipe says, what is chosen, stored and computed, and what is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpress
from bitpress import native
from bitpress.calibration import STATISTICS, observers
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.comparison.variants import read_candidates
from bitpress.errors import CheckpointError, FormatError, NumericsError, UsageError
from bitpress.exchange.compressed_tensors import CompressedTensors
from bitpress.formats import ActivationFormat, AttentionOperands, ChannelFormat, CompressedLayer, parse_format
from bitpress.models.opening import open_original, open_streamed
from bitpress.models.walk import Stream, walk
from bitpress.pipeline.estimate import _made_up, estimate_seconds
from bitpress.pipeline.exporting import export_model, open_model
from bitpress.pipeline.quantize import plan_run
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import NAMED_RECIPES, build_method, make_recipe
from bitpress.recipes.schemes import SCHEMES, scheme_keys
from bitpress.runtime.hf.layers import PackedLinear
from bitpress.runtime.native.assemble import refuses_directory

TOKENS = torch.arange(6, 38).reshape(2, 16)
# Schemes that leave inputs as they are.
WEIGHTS_ALONE = {"nvfp4a16"}
CALIBRATION = {"samples": 2, "length": 32}
LOCAL = {"format": "e2m1-g16-fp8", "parameters": "local"}
STATIC = {"format": "int8-tensor-zero", "parameters": "static"}


def quantize(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    recipe = {"weights": "int8-row", "quantizer": "rtn", "calibration": CALIBRATION, **keys}
    return bitpress.quantize(model, out, recipe=recipe, proof_tokens=0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def streamed(path: Path) -> torch.Tensor:
    """Run the model block by block, as the proof does."""
    model = open_streamed(path, torch.float32)
    model.load_outer_()
    stream = Stream(model, [TOKENS])
    stream.start_()
    walk(model, [stream])
    return model.outputs(TOKENS, stream.states[0])


@pytest.mark.parametrize(
    "keys", [{"inputs": "int8-row"}, {"inputs": STATIC}, {"inputs": "mxfp4", "transforms": ["hadamard"]}, {"inputs": LOCAL}]
)
def test_every_road_computes_the_rounded_product_to_the_bit(
    keys: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantize(tiny_model("llama"), out, **keys)
    wanted = make_recipe({"weights": "int8-row", **keys}).inputs
    assert wanted is not None
    records = CompressedCheckpoint.open(out).manifest.weights
    name = build_method(make_recipe(keys)).inputs.format.name  # type: ignore[union-attr]
    assert {(r.input["format"], r.input["parameters"]) for r in records.values() if r.input} == {(name, wanted.parameters)}
    assert {row["inputs"] for row in report["layers"]} == {f"{name} {wanted.parameters}"}
    decoded, packed = (bitpress.load(out, weights=weights, dtype="fp32") for weights in ("decoded", "packed"))
    assert torch.equal(logits(decoded), logits(packed))
    assert torch.equal(logits(decoded), streamed(out))
    plain = tmp_path / "plain"
    quantize(tiny_model("llama"), plain, **{**keys, "inputs": None})
    assert not torch.equal(logits(decoded), logits(bitpress.load(plain, dtype="fp32")))


FIRST = {"format": "int4-row-fp32", "first": {"share": 0.25, "format": "int8-row-fp32"}}


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        (
            {"inputs": FIRST, "transforms": ["shift", "smoothquant", {"name": "klt", "parts": 4}, "disassemble"]},
            {"shift", "copies"},
        ),
        (
            {"inputs": STATIC, "transforms": ["shift", {"name": "smooth-plus", "alpha": 0.5}, "disassemble"]},
            {"shift", "copies", "scale", "zero"},
        ),
    ],
)
def test_channels_that_are_not_rounded_alike(
    keys: dict[str, Any], stored: set[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(tiny_model("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("ln_2.bias"):
            value.add_(torch.linspace(-5, 5, len(value)))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize(source, out, **keys)
    assert all("shifted" in row["inputs"] for row in report["layers"])
    checkpoint = CompressedCheckpoint.open(out)
    for name in checkpoint.manifest.weights:
        layer = checkpoint.read_layer(name)
        assert isinstance(layer.input, ChannelFormat)
        assert set(layer.input.tensors) == stored
    decoded, packed = (bitpress.load(out, weights=weights, dtype="fp32") for weights in ("decoded", "packed"))
    assert torch.equal(logits(decoded), logits(packed))
    assert torch.equal(logits(decoded), streamed(out))
    # What is stored of channels is where they really lie: the middles of another text are near.
    seen: dict[str, torch.Tensor] = {}
    decoded.transformer.h[1].mlp.c_fc.register_forward_pre_hook(lambda _, x: seen.update(x=x[0].flatten(0, 1)))
    logits(decoded)
    layer = checkpoint.read_layer("transformer.h.1.mlp.c_fc.weight")
    assert isinstance(layer.input, ChannelFormat)
    assert layer.input.shift is not None
    x = seen["x"] if layer.weight.input_map is None else layer.weight.input_map.apply(seen["x"])
    middle = (x.amax(0) + x.amin(0)) / 2
    assert (layer.input.shift - middle).norm() < 0.3 * middle.norm()
    with pytest.raises(UsageError, match="the input of its product is rounded"):
        export_model(out, tmp_path / "gptq", "gptq")
    plain = {"shape": [4, 32], "terms": [{"kind": "packed", "format": "int8-row"}], "input_map": None, "output_map": None}
    assert "are not rounded alike (first)" in str(
        CompressedTensors.refuses(plain, {"format": "int8-row", "parameters": "dynamic", "first": "8 int4-row"})
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"transforms": ["shift"]}, "shift changes how inputs are rounded, and this recipe rounds none"),
        ({"transforms": ["smoothquant", "shift"], "inputs": "int8-row"}, "shift moves the channels that scales"),
        ({"transforms": ["shift", "shift"], "inputs": "int8-row"}, "named twice"),
        ({"inputs": {**STATIC, "first": {"share": 0.5, "format": "int8-row"}}}, "need dynamic parameters"),
        ({"inputs": {"format": "int4-row", "first": {"share": 0.5, "format": "int8-tensor"}}}, "tokens would share"),
        ({"inputs": {"format": "int4-row", "first": {"share": 1.0, "format": "int8-row"}}}, "a number below 1.0"),
    ],
)
def test_channels_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises((FormatError, UsageError), match=says):
        make_recipe(keys)


def test_first_channels_that_do_not_fit_are_refused_by_the_plan(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    wide = {"format": "int4-g16", "first": {"share": 0.25, "format": "int8-row"}}
    with pytest.raises(FormatError, match=r"first 0.25 of the channels int8-row: .*not a multiple of 16"):
        quantize(tiny_model("llama"), tmp_path / "out", inputs=wide)


def test_some_weights_are_rotated_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {**NAMED_RECIPES["quarot"].keys, "quantizer": "rtn"}
    quantize(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", **recipe)
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    rotated = {
        name.split(".")[-2] for name in checkpoint.manifest.weights if checkpoint.read_weight(name).input_map is not None
    }
    assert rotated == {"down_proj"}
    assert all(record.input is not None for record in checkpoint.manifest.weights.values())
    resolved = build_method(make_recipe(recipe)).resolved()
    assert resolved["overrides"][0]["transforms"] == [{"name": "hadamard", "block": "row", "outputs": False, "seed": 0}]
    assert build_method(make_recipe(resolved)).resolved() == resolved
    other = [{"match": "*", "transforms": ["smoothquant"]}]
    with pytest.raises(UsageError, match="smoothquant does not change single weights alone"):
        make_recipe({"overrides": other})
    none = build_method(make_recipe({"transforms": ["Hadamard"], "overrides": [{"match": "*.q_proj", "transforms": []}]}))
    assert (len(none.for_layer("a.q_proj").changes), len(none.for_layer("a.k_proj").changes)) == (0, 1)


CORRECTED = ({"name": "lqer", "rank": 4}, {"name": "lorc", "rank": 4}, {"name": "svdquant", "rank": 4}, {"name": "outliers"})


@pytest.mark.parametrize("i", range(4))
def test_corrections_and_bipolar_codes_go_with_rounded_inputs(i: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Every term is multiplied by the rounded input, to the bit on every road."""
    width = (4, 4, 3, 2)[i]
    keys = {"weights": f"bipolar{width}-row", "inputs": f"bipolar{width}-row-fp32", "corrections": [CORRECTED[i]]}
    quantize(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", **keys)
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    assert all(len(checkpoint.read_weight(name).terms) == 2 for name in checkpoint.manifest.weights if ".layers." in name)
    model = bitpress.load(tmp_path / "out", dtype="fp32")
    assert torch.equal(logits(model), streamed(tmp_path / "out"))


def test_the_next_block_sees_what_rounded_inputs_make(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    codes = {}
    for inputs in (None, "int3-row"):
        out = tmp_path / str(inputs)
        quantize(tiny_model("llama"), out, weights="int4-g32", quantizer="gptq", inputs=inputs)
        checkpoint = CompressedCheckpoint.open(out)
        codes[inputs] = [checkpoint.read_weight(f"model.layers.{i}.mlp.up_proj.weight").dequantize() for i in (0, 1)]
    assert torch.equal(codes[None][0], codes["int3-row"][0])
    assert not torch.equal(codes[None][1], codes["int3-row"][1])


def test_static_parameters_are_those_of_the_inputs_behind_folded_scales(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    scales = {}
    for transforms in ([], ["smoothquant"]):
        out = tmp_path / str(len(transforms))
        quantize(tiny_model("llama"), out, inputs={**STATIC, "format": "int8-tensor"}, transforms=transforms)
        model = bitpress.load(out, dtype="fp32")
        seen: dict[str, float] = {}
        module = model.model.layers[0].mlp.up_proj
        module.register_forward_pre_hook(lambda _, x: seen.update(top=float(x[0].abs().max())))  # noqa: B023
        logits(model)
        layer = CompressedCheckpoint.open(out).read_layer("model.layers.0.mlp.up_proj.weight")
        assert layer.input is not None
        scales[len(transforms)] = float(layer.input.tensors["scale"])
        assert scales[len(transforms)] * 127 == pytest.approx(seen["top"], rel=0.7)  # of another text
    assert scales[0] != scales[1]


def test_inputs_of_some_weights_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    overrides = [{"match": "*.down_proj", "inputs": "keep"}, {"match": "*.o_proj", "inputs": "int4-row"}]
    quantize(tiny_model("llama"), tmp_path / "out", inputs="int8-row", overrides=overrides)
    records = CompressedCheckpoint.open(tmp_path / "out").manifest.weights
    found = {
        name.split(".")[-2]: None if r.input is None else r.input["format"] for name, r in records.items() if "layers" in name
    }
    assert found["down_proj"] is None
    assert found["o_proj"] == "int4-row"
    assert found["q_proj"] == "int8-row"


def test_a_recipe_with_inputs_is_spelled_out_and_read_again() -> None:
    said = {"inputs": {**STATIC, "observer": "Percentile"}, "overrides": [{"match": "*.k_proj", "inputs": "int8-row"}]}
    resolved = build_method(make_recipe(said)).resolved()
    assert resolved["inputs"] == {**STATIC, "observer": {"name": "percentile", "keep": 99.99}}
    assert resolved["overrides"][0]["inputs"] == {"format": "int8-row", "parameters": "dynamic"}
    assert build_method(make_recipe(resolved)).resolved() == resolved
    assert "inputs" not in build_method(make_recipe({})).resolved()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"format": "int8-tensor"}, "tokens would share dynamic parameters"),
        ({"format": "int8-row", "parameters": "static"}, "use|block tensor"),
        ({"format": "nvfp4"}, "tokens would share dynamic parameters"),
        ({"format": "nvfp4", "parameters": "static"}, "block tensor"),
        ({"format": "nvfp4", "parameters": "local", "observer": "entropy"}, "entropy compares the codes of one range"),
        ({"format": "int8-row", "observer": "mse"}, "an observer chooses static parameters"),
        ({**STATIC, "observers": "mse"}, "inputs.observers: unknown key of inputs 'observers'"),
        ({**STATIC, "format": "aq2x8x8-tensor"}, "a range does not say its static parameters"),
        ({**STATIC, "observer": "average"}, "unknown observer 'average'"),
        ({**STATIC, "observer": {"name": "percentile", "keep": 20}}, "keep is 20 percent"),
        ("int8-rows", "unknown|int8-row"),
    ],
)
def test_inputs_that_cannot_be(inputs: Any, says: str) -> None:
    with pytest.raises((FormatError, UsageError), match=says):
        make_recipe({"inputs": inputs})


def test_what_cannot_round_its_inputs_is_refused_by_the_plan(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"inputs int8-g48 dynamic: .*not a multiple of 48"):
        quantize(tiny_model("llama"), tmp_path / "out", inputs="int8-g48")
    with pytest.raises(FormatError, match=r"is no plain linear layer.*experts"):
        quantize(tiny_model("mixtral"), tmp_path / "out", inputs="int8-row")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_ends_in_a_model(scheme: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    narrow = {"weights": "e4m3-16x16", "inputs": "e4m3-g16-fp32"} if scheme == "fp8-block" else {}
    report = bitpress.quantize(tiny_model("llama"), out, scheme=scheme, samples=2, length=32, proof_tokens=0, **narrow)
    rounded = scheme not in WEIGHTS_ALONE
    assert all((row["inputs"] is not None) is rounded for row in report["layers"] if "layers." in row["name"])
    assert bool(torch.isfinite(logits(bitpress.load(out, dtype="fp32"))).all())


def test_a_scheme_and_what_contradicts_it() -> None:
    with pytest.raises(UsageError, match="scheme and bits both say"):
        bitpress.quantize("m", "o", scheme="w8a8", bits=4)
    with pytest.raises(UsageError, match="unknown scheme 'w8b8'"):
        bitpress.quantize("m", "o", scheme="w8b8")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "fp8", "fp8-static", "nvfp4", "nvfp4a16"])
def test_schemes_leave_code_for_code_and_come_back(scheme: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out, ct = tmp_path / "out", tmp_path / "ct"
    bitpress.quantize(
        tiny_model("llama"), out, scheme=scheme, samples=2, length=32, proof_tokens=0, embeddings="keep", head="keep"
    )
    done = export_model(out, ct, "compressed-tensors")
    assert {fate.how for fate in done.fates.values()} == {"exact"}
    config = json.loads((ct / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    inputs = config["input_activations"]
    told = None if inputs is None else inputs["dynamic"]
    assert told == {"w8a8-static": False, "fp8-static": False, "nvfp4": "local", "nvfp4a16": None}.get(scheme, True)
    assert torch.equal(logits(bitpress.load(open_model(ct), dtype="fp32")), logits(bitpress.load(out, dtype="fp32")))


def test_static_parameters_are_those_of_the_block_s_own_inputs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    scales = {}
    for quantizer in ("rtn", "gptq"):
        out = tmp_path / quantizer
        quantize(tiny_model("llama"), out, quantizer=quantizer, inputs={**STATIC, "format": "int8-tensor"})
        checkpoint = CompressedCheckpoint.open(out)
        layers = [checkpoint.read_layer(f"model.layers.{i}.mlp.down_proj.weight") for i in (0, 1)]
        scales[quantizer] = [float(layer.input.tensors["scale"]) for layer in layers if layer.input is not None]
    assert scales["rtn"] == pytest.approx(scales["gptq"], rel=0.05)
    assert scales["rtn"][0] != pytest.approx(scales["rtn"][1], rel=0.05)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_static_parameters_behind_the_original_s_blocks_are_those_of_its_inputs(
    quantizer: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The q_proj of a block reads what its norm makes of the block's input, whatever was done to the blocks before."""
    scales: dict[str, list[float]] = {}
    for weights, inputs in (("int2-g32-zero", "original"), ("int2-g32-zero", "pressed"), ("int8-row-fp32", "original")):
        out = tmp_path / f"{weights}-{inputs}"
        calibration = {**CALIBRATION, "inputs": inputs}
        static = {**STATIC, "format": "int8-tensor-fp32"}
        quantize(tiny_model("llama"), out, weights=weights, quantizer=quantizer, inputs=static, calibration=calibration)
        checkpoint = CompressedCheckpoint.open(out)
        layers = [checkpoint.read_layer(f"model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1)]
        scales[f"{weights}-{inputs}"] = [float(layer.input.tensors["scale"]) for layer in layers if layer.input is not None]
    coarse, pressed, fine = scales.values()
    assert coarse == fine
    assert coarse[0] == pressed[0]
    assert coarse[1] != pressed[1]


@pytest.mark.parametrize(
    ("keys", "transforms"),
    [({"inputs": "int3-row"}, []), ({"inputs": STATIC | {"format": "int3-tensor"}}, ["qep"]), ({"values": "int2-row"}, [])],
)
def test_a_sequential_recipe_sees_what_rounded_inputs_before_it_give(
    keys: dict[str, Any], transforms: list[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    found = {}
    for name, own in (("plain", {}), ("rounded", keys)):
        out = tmp_path / name
        calibration = {**CALIBRATION, "sequential": True}
        quantize(
            tiny_model("llama"),
            out,
            weights="int4-g32",
            quantizer="gptq",
            transforms=transforms,
            calibration=calibration,
            **own,
        )
        checkpoint = CompressedCheckpoint.open(out)
        names = ("self_attn.q_proj", "self_attn.o_proj")
        found[name] = [checkpoint.read_weight(f"model.layers.0.{part}.weight").dequantize() for part in names]
        assert torch.equal(logits(bitpress.load(out, dtype="fp32")), streamed(out))
    assert torch.equal(found["plain"][0], found["rounded"][0])  # nothing is rounded before the first stage
    assert not torch.equal(found["plain"][1], found["rounded"][1])


@torch.no_grad()
def test_the_original_beside_a_sequential_recipe_rounds_nothing(tiny_model: Callable[..., Path]) -> None:
    model, _ = open_original(tiny_model("llama"), torch.float32)
    model.load_outer_()
    hidden = model.embed(TOKENS)
    model.load_block_(0)
    before = model.run_block(0, hidden)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = RTN().quantize(model.model.get_parameter(name).data, None, parse_format("int8-row")).weight
    model.set_products_({name: CompressedLayer(weight, ActivationFormat(parse_format("int2-row")))})
    model.set_attention_({"model.layers.0.self_attn": AttentionOperands(keys=ActivationFormat(parse_format("int2-row")))})
    rounded = model.run_block(0, hidden)
    assert not torch.allclose(rounded, before, atol=1e-3)
    with model.unrounded(0):
        assert torch.equal(model.run_block(0, hidden), before)
    assert torch.equal(model.run_block(0, hidden), rounded)


def test_settings_of_inputs_are_set_key_by_key() -> None:
    method = build_method(make_recipe({"inputs": "int8-row"}, ["inputs.format=int6-row"]))
    assert method.inputs is not None
    assert method.inputs.format.name == "int6-row"
    assert build_method(make_recipe({"inputs": "keep"})).inputs is None
    with pytest.raises(UsageError, match=r"overrides\.0\.inputs\.observers: unknown key of inputs"):
        make_recipe({"overrides": [{"match": "*", "inputs": {"format": "int8-row", "observers": "mse"}}]})


def test_a_head_whose_input_is_rounded_is_rounded_on_every_road(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama", tie_word_embeddings=False), out, head="int8-row")
    path = out / "bitpress.json"
    manifest = json.loads(path.read_text())
    before = streamed(out)
    manifest["weights"]["lm_head.weight"]["input"] = {"format": "int3-row", "parameters": "dynamic"}
    path.write_text(json.dumps(manifest))
    assert torch.equal(logits(bitpress.load(out, dtype="fp32")), streamed(out))
    assert not torch.allclose(before, streamed(out), atol=1e-2)


def test_a_recipe_rounds_the_input_of_a_head(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny_model("llama", tie_word_embeddings=False)
    report = quantize(model, out, head={"weights": "int8-row", "inputs": "int3-row"})
    assert [row["inputs"] for row in report["layers"] if row["name"] == "lm_head"] == ["int3-row dynamic"]
    said = CompressedCheckpoint.open(out).manifest.recipe["head"]
    assert said["inputs"] == {"format": "int3-row", "parameters": "dynamic"}
    assert build_method(make_recipe({"head": said})).resolved()["head"] == said
    loaded = bitpress.load(out, dtype="fp32")
    assert torch.equal(logits(loaded), streamed(out))
    if native.available():
        assert "input of the output head is rounded" in str(refuses_directory(CompressedCheckpoint.open(out)))
    assert isinstance(loaded.lm_head, PackedLinear)
    layer = loaded.lm_head.layer()
    loaded.lm_head = PackedLinear(CompressedLayer(layer.weight), None, torch.float32)
    assert not torch.allclose(logits(loaded), streamed(out), atol=1e-2)


@pytest.mark.parametrize("observer", ["minmax", "output"])
def test_the_input_of_a_head_has_stored_parameters(observer: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """They serve what the last norm gives on the calibration text, and every road computes with them."""
    out, model = tmp_path / "out", tiny_model("llama", tie_word_embeddings=False)
    own = {"format": "int4-tensor-zero", "parameters": "static", "observer": observer}
    report = quantize(model, out, head={"weights": "int8-row", "inputs": own})
    assert [row["inputs"] for row in report["layers"] if row["name"] == "lm_head"] == ["int4-tensor-zero static"]
    found = CompressedCheckpoint.open(out).read_layer("lm_head.weight").input
    loaded = bitpress.load(out, dtype="fp32")
    assert torch.equal(logits(loaded), streamed(out))
    assert torch.equal(logits(bitpress.load(out, dtype="fp32", weights="packed")), streamed(out))
    seen: list[torch.Tensor] = []
    loaded.model.norm.register_forward_hook(lambda _, x, y: seen.append(y))
    logits(loaded)
    # Other text than the calibration's, so the range is about that of its inputs, and not of another one.
    assert isinstance(found, ActivationFormat)
    span = 15 * float(found.stored()["scale"])
    assert 0.3 * float(seen[0].max() - seen[0].min()) < span < 2 * float(seen[0].max() - seen[0].min())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"embeddings": {"weights": "int8-row", "inputs": "int8-row"}}, "have no input to round"),
        ({"embeddings": {"weights": "int8-row", "inputs": STATIC}}, "have no input to round"),
        ({"head": {"weights": "int8-row", "inputs": "int8-row"}}, "rows of a tied matrix are looked up too"),
        ({"head": {"weights": "int8-row", "inputs": "int8-g48"}}, "not a multiple of 48"),
    ],
)
def test_inputs_that_a_matrix_outside_the_blocks_cannot_round(
    keys: dict[str, Any], says: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((FormatError, UsageError), match=says):
        quantize(tiny_model("llama", tie_word_embeddings="tied" in says), tmp_path / "out", **keys)


def test_a_rounded_model_is_not_quantized_again(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, inputs="int8-row")
    with pytest.raises(CheckpointError, match=r"the inputs of its products are rounded.*quantize the original model"):
        bitpress.quantize(out, tmp_path / "again", requantize=True, proof_tokens=0)


def test_a_range_that_is_not_finite_names_the_weight(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def overflow(self: Any, x: torch.Tensor) -> None:
        raise NumericsError("the input holds a NaN or an infinity.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.Seen, "add", overflow)
        with pytest.raises(NumericsError, match=r"model\.layers\.0\.\S+: the input holds a NaN"):
            quantize(tiny_model("llama"), tmp_path / "out", inputs=STATIC)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "fp8-static"])
def test_the_time_of_a_scheme_is_estimated(scheme: str, tiny_model: Callable[..., Path]) -> None:
    recipe = make_recipe({**scheme_keys(scheme), "calibration": CALIBRATION})
    plan, model, _ = plan_run(tiny_model("llama"), build_method(recipe))
    assert estimate_seconds(model, build_method(recipe), plan.weights) > 0
    assert set(STATISTICS) - {"row_gram", "head_gram"} <= {
        name for name in STATISTICS if getattr(_made_up(4, 8, set(STATISTICS), None), name) is not None
    }


@pytest.mark.parametrize("observer", ["output", "channel-percentile"])
def test_an_observer_of_whole_tokens_chooses_a_range(observer: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    scales = []
    for name in ("minmax", observer):
        out = tmp_path / name
        quantize(
            tiny_model("llama"),
            out,
            transforms=["hadamard"],
            inputs={"format": "int4-tensor", "parameters": "static", "observer": name},
        )
        layer = CompressedCheckpoint.open(out).read_layer("model.layers.1.mlp.up_proj.weight")
        assert layer.input is not None
        scales.append(float(layer.input.tensors["scale"]))
    assert 0.2 * scales[0] < scales[1] < scales[0]


def test_an_input_that_was_always_zero_is_noted(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = quantize(model, tmp_path / "out", inputs={**STATIC, "format": "int8-tensor"})
    noted = [note["weight"] for note in report["notes"] if "its input was 0 on all calibration text" in note["what"]]
    assert noted == ["model.layers.1.mlp.down_proj"]


def test_the_memory_of_a_rounded_layer_is_that_of_two(tiny_model: Callable[..., Path]) -> None:
    peaks = []
    for said in ({}, {"inputs": "int8-row"}):
        method = build_method(make_recipe({"weights": "int8-row", "quantizer": "rtn", "compute": "fp32", **said}))
        plan, *_ = plan_run(tiny_model("llama"), method)
        peaks.append(plan.peak_memory)
    held = sum(w.weights for w in plan.weights if w.block == 0) * 4
    assert peaks[1] - peaks[0] == held


def test_a_comparison_looks_at_inputs_behind_compressed_blocks(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes.yaml"
    recipes.write_text("static: {weights: int8-row, quantizer: rtn, inputs: {format: int8-tensor, parameters: static}}")
    (candidate,), _ = read_candidates(recipes, [8])
    assert candidate.recipe.calibration.inputs == "pressed"
