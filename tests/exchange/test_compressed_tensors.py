"""What golden files of one version do not show: older packing, orders of inputs, and how layers find their scheme."""

import json
from typing import Any

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.exchange.compressed_tensors import CompressedTensors
from bitpress.exchange.compressed_tensors_scheme import Args, read_schemes
from bitpress.exchange.source import StoredLayer
from bitpress.exchange.words import join_words, split_apart
from bitpress.formats import ActivationFormat, CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.formats.maps.map import Permutation

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": False}
W8 = {**W4, "num_bits": 8}


def layer(name: str, shape: tuple[int, int] = (8, 24), order: torch.Tensor | None = None, inputs: str = "") -> CompressedLayer:
    w, fmt = torch.randn(shape, generator=torch.Generator().manual_seed(3)), parse_format(name)
    params = fmt.fit(w)
    term = Packed.pack(fmt, fmt.encode(w, params), params)
    weight = CompressedWeight((term,), None if order is None else Permutation.of(order))
    return CompressedLayer(weight, ActivationFormat(parse_format(inputs)) if inputs else None)


def settings(**groups: Any) -> dict[str, Any]:
    return {"format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("count", [10, 20, 33, 64])
def test_codes_that_stay_inside_their_words_are_told_from_those_that_do_not(bits: int, count: int) -> None:
    """Packing before version 0.18, here by its definition; where the numbers of words agree the version decides."""
    codes = torch.randint(0, 1 << bits, (4, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    each = 32 // bits
    words = torch.zeros(4, -(-count // each), dtype=torch.int64)
    for i in range(count):
        words[:, i // each] |= codes[:, i].long() << bits * (i % each)
    old = (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
    assert torch.equal(split_apart(old, bits, count), codes)
    tensors = {"weight_scale": torch.ones(4, 1), "weight_shape": torch.tensor([4, count])}
    for packed, version in (
        (old, "0.9.4"),
        (join_words(codes, bits, fill=True), "0.18.0"),
        (join_words(codes, bits, fill=True), None),
    ):
        told = settings(a={"targets": ["Linear"], "weights": {"num_bits": bits, "strategy": "channel"}}) | {"version": version}
        scheme = read_schemes(told, ["x"])["x"]
        read = CompressedTensors.read(StoredLayer(tensors | {"weight_packed": packed}, scheme.to_json())).weight.terms[0]
        assert isinstance(read, Packed)
        assert torch.equal(read.unpack_codes(), codes), version


def test_an_order_of_inputs_is_the_group_of_each_of_them() -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    given = layer("int4-g8-zero", order=order)
    stored = CompressedTensors.write(given)
    assert stored.entry["weights"]["actorder"] == "group"
    groups = stored.tensors["weight_g_idx"].long()
    again = CompressedTensors.read(stored)
    assert torch.equal(again.weight.dequantize(), given.weight.dequantize())
    # Columns are where they are in the model: a reader needs nothing but the groups.
    term = given.weight.terms[0]
    assert isinstance(term, Packed)
    codes, params = term.unpack()
    back = torch.argsort(order)
    plain = (codes[:, back].float() - params["zero"][:, groups]) * params["scale"][:, groups]
    assert torch.equal(plain, given.weight.dequantize())
    none = StoredLayer({**stored.tensors, "weight_g_idx": torch.full((24,), -1, dtype=torch.int32)}, stored.entry)
    assert CompressedTensors.read(none).weight.input_map is None


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class() -> None:
    told = settings(
        a={"targets": ["Linear"], "weights": W4},
        b={"targets": ["re:.*down_proj"], "weights": W8},
        c={"targets": ["model.layers.1.mlp.down_proj"], "weights": {**W8, "group_size": 16}},
    )
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    found = [(s.weights.num_bits, s.weights.group_size) for s in read_schemes(told, names).values()]
    assert found == [(4, 8), (8, 8), (8, 16)]


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (settings(a={"targets": ["other"], "weights": W4}), "no group of config_groups"),
        (settings(a={"targets": ["Linear"], "weights": W4}) | {"ignore": ["re:x.*"]}, "`ignore`"),
        (settings(a={"targets": ["Linear"], "weights": W4}) | {"version": "1.2.0"}, "'1.2.0'"),
        (settings(a={"targets": ["Linear"], "weights": W4}) | {"quantization_status": "calibration"}, "'calibration'"),
        (settings(a={"targets": ["Linear"], "weights": W4}) | {"kv_cache_scheme": W8}, "kv_cache_scheme"),
        (
            settings(a={"targets": ["Linear"], "weights": W4}) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "24-bitmask",
        ),
        (
            settings(a={"targets": ["Linear"], "weights": W4}) | {"transform_config": {"config_groups": {"u": {}}}},
            "transform_config",
        ),
        (settings(a={"targets": ["Linear"], "weights": W4, "format": "marlin-24"}), "'marlin-24'"),
        (settings(a={"targets": ["Linear"], "weights": {**W4, "codebook": 1}}), "'codebook'"),
        (settings(a={"targets": ["Linear"], "weights": W4, "output_activations": W8}), "outputs"),
        (settings(a={"targets": ["re:("], "weights": W4}), "no pattern"),
        (settings(a={"targets": ["Linear"], "weights": W4}) | {"ignore": ["re:(a+)+b"]}, "may take for ever"),
        (settings(a={"targets": ["Linear"], "weights": {**W4, "symmetric": "false"}}), "symmetric is 'false'"),
        (settings(a={"targets": ["Linear"], "weights": {**W4, "dynamic": 1}}), "dynamic is '1'"),
        (settings(a={"targets": ["Linear"], "weights": {**W4, "actorder": "yes"}}), "actorder 'yes'"),
        (
            settings(
                a={
                    "targets": ["Linear"],
                    "weights": W4,
                    "input_activations": {**W4, "strategy": "tensor_group", "dynamic": "local"},
                }
            ),
            "read as NVFP4 alone",
        ),
        (
            settings(a={"targets": ["Linear"], "weights": W4, "input_activations": {"strategy": "tensor", "dynamic": True}}),
            "dynamic inputs",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(told: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        read_schemes(told, ["x"])


@pytest.mark.parametrize(
    ("name", "inputs", "text"),
    [
        ("e2m1-g16-fp8", "", "fp8over"),
        ("int4-2x12", "", "in groups of inputs, rows"),
        ("nf4-g8", "", "not a format"),
        ("int4-g8-s4", "", "not a format"),
        ("int8-row", "int8-row", "int8-row-fp32"),
        ("int8-row", "nf4-row", "does not say"),
    ],
)
def test_a_layer_that_cannot_be_told_is_refused(name: str, inputs: str, text: str) -> None:
    given = layer(name, (8, 48), inputs=inputs)
    with pytest.raises(FormatError, match=text):
        CompressedTensors.write(given)


def test_local_scales_are_told_as_nvfp4_alone() -> None:
    told = Args.of_input("e2m1-g16-fp8over", "local")
    assert isinstance(told, Args)
    assert Args.from_json({**told.to_json(), "observer": "static_minmax", "zp_dtype": "torch.float8_e4m3fn"}) == told
    refused = Args.of_input("e2m1-g16-fp8", "local")
    assert isinstance(refused, str)
    assert "e2m1-g16-fp8over it does" in refused


def test_the_configuration_names_what_is_stored_as_it_is() -> None:
    one, other = (json.loads(json.dumps(dict(CompressedTensors.write(layer(n)).entry))) for n in ("int4-g8", "int8-g8"))
    alone = CompressedTensors.configure({}, {"model.a": one, "model.b": one}, ["model.c"])["quantization_config"]
    assert [group["targets"] for group in alone["config_groups"].values()] == [["Linear"]]
    assert alone["ignore"] == ["lm_head", "model.c"]
    mixed = CompressedTensors.configure({}, {"model.a": one, "lm_head": other}, [])["quantization_config"]
    assert sorted(group["targets"] for group in mixed["config_groups"].values()) == [["lm_head"], ["model.a"]]
    assert mixed["ignore"] == []
    assert mixed["format"] == "pack-quantized"
