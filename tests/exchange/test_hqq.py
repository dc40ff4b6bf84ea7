"""HQQ checkpoints: which formats its zero points need, codes in the bytes that its packers make, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.hqq import Hqq
from bitpress.exchange.plain_layer import make_plain
from bitpress.exchange.source import StoredLayer
from bitpress.formats import CompressedLayer, Packed, parse_format

OUT, IN = 8, 64
# Of the layers of tests/golden/exchange/hqq.safetensors.
FORMATS = {
    "eight": "int8-g32-zerofp16",
    "six": "int6-g16-zerofp16",
    "four": "int4-g64-zerofp16",
    "four_row": "int4-row-zerofp16-bf16",
    "three": "int3-g32-zerofp16",
    "two": "int2-g16-zerofp32-fp32",
    "one": "int1-g32-zerofp16",
    "whole": "int4-g32-zero",
    "small": "int4-g32-zerofp32-bf16",
    "floats": "int2-g32-zerofp16-bf16",
    "across": "int4-g16-zerofp16",
}


def layer(name: str) -> CompressedLayer:
    fmt, w = parse_format(name), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    params = fmt.fit(w)
    return make_plain(fmt, fmt.encode(w, params), params)


def test_the_golden_layers_are_read_in_the_plainest_format_that_has_their_zero_points() -> None:
    folder = Path(__file__).parents[1] / "golden" / "exchange"
    held, told = load_file(folder / "hqq.safetensors"), json.loads((folder / "hqq.json").read_text())
    found = {}
    for name, entry in Hqq.entries({"quantization_config": told}, {name: {} for name in FORMATS}).items():
        tensors = {leaf.removeprefix(f"{name}."): t for leaf, t in held.items() if leaf.startswith(f"{name}.")}
        del tensors["decoded"]
        term = Hqq.read(StoredLayer(tensors, entry)).weight.terms[0]
        assert isinstance(term, Packed)
        found[name] = term.format.name
    assert found == FORMATS


@pytest.mark.parametrize("store", ["", "-bf16", "-fp32"])
@pytest.mark.parametrize("zero", ["", "-zero", "-zerofp16", "-zerofp32"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_codes_scales_and_zero_points_go_there_and_back(bits: int, zero: str, store: str) -> None:
    if bits == 1 and not zero:
        return
    before = layer(f"int{bits}-g32{zero}{store}")
    stored = Hqq.write(before)
    after = Hqq.read(StoredLayer(stored.tensors, json.loads(json.dumps(dict(stored.entry)))))
    assert after.weight.spec() == before.weight.spec()
    assert after.tensors().keys() == before.tensors().keys()
    assert all(torch.equal(value, after.tensors()[name]) for name, value in before.tensors().items())


def test_bytes_hold_rows_of_groups_that_lie_apart() -> None:
    """As hqq packs 4 bits: the first half of the groups in the high halves of the bytes, the second half in the low ones."""
    term = (before := layer("int4-g32-zerofp16")).weight.terms[0]
    assert isinstance(term, Packed)
    codes = term.unpack_codes().reshape(-1, 32)
    assert torch.equal(Hqq.write(before).tensors["W_q"], codes[:8] * 16 + codes[8:])


DAMAGES: dict[str, tuple[str, torch.Tensor | None]] = {
    "axis 0 of HQQ": ("axis", torch.tensor(0, dtype=torch.int32)),
    "nbits 7": ("nbits", torch.tensor(7, dtype=torch.int32)),
    "nbits is torch.float32 [] 1.58": ("nbits", torch.tensor(1.58)),
    "quant_scale 1": ("quant_scale", torch.tensor(1, dtype=torch.uint8)),
    "channel_wise 0": ("channel_wise", torch.tensor(0, dtype=torch.uint8)),
    "zero_scale": ("zero_scale", torch.zeros(2, 16, 1)),
    "no scale": ("scale", None),
    "group_size 48 does not divide": ("group_size", torch.tensor(48, dtype=torch.int32)),
    "group_size 0 does not divide": ("group_size", torch.tensor(0, dtype=torch.int32)),
    "is not '4bit_u8'": ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8)),
    "where torch.uint8 [8, 32] is needed": ("W_q", torch.zeros(8, 32, dtype=torch.int32)),
    "where [16, 1] floats are needed": ("zero", torch.zeros(16, 2)),
    "shape is [8, 0]": ("shape", torch.tensor([8, 0])),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_layers_are_refused_in_one_line(message: str) -> None:
    stored = Hqq.write(layer("int4-g32-zerofp16"))
    name, value = DAMAGES[message]
    tensors = {leaf: t for leaf, t in stored.tensors.items() if leaf != name} | ({} if value is None else {name: value})
    with pytest.raises(FormatError, match=re.escape(message)) as error:
        Hqq.read(StoredLayer(tensors, stored.entry))
    assert "\n" not in str(error.value)


def test_six_bits_in_a_byte_are_no_more_than_six() -> None:
    stored = Hqq.write(layer("int6-g32-zerofp16"))
    with pytest.raises(FormatError, match="6 bits do not"):
        Hqq.read(StoredLayer({**stored.tensors, "W_q": torch.full((16, 32), 64, dtype=torch.uint8)}, stored.entry))


@pytest.mark.parametrize("name", ["int7-g32", "nf4-g32", "int4-g32-min", "int4-2x32", "int4-g32-zero-s6"])
def test_what_hqq_does_not_have_is_refused_with_a_reason(name: str) -> None:
    refused = layer(name)
    assert Hqq.refuses(refused.weight.spec()) is not None
    with pytest.raises(FormatError):
        Hqq.write(refused)


def test_groups_that_do_not_fill_bytes_are_refused() -> None:
    fmt, w = parse_format("int4-g64-zerofp16"), torch.randn(3, 64)
    params = fmt.fit(w)
    with pytest.raises(FormatError, match="3 groups do not fill the 2 parts"):
        Hqq.write(make_plain(fmt, fmt.encode(w, params), params))


def test_kinds_of_layers_have_settings_of_their_own() -> None:
    entries = {
        f"model.layers.{i}.mlp.{name}": dict(Hqq.write(layer(fmt)).entry)
        for i in (0, 1)
        for name, fmt in (("up_proj", "int4-g32-zerofp16"), ("down_proj", "int8-row"))
    }
    told = Hqq.configure({}, entries, ["model.embed_tokens"])["quantization_config"]
    assert told["quant_config"].keys() == {"mlp.up_proj", "mlp.down_proj"}
    assert told["skip_modules"] == ["lm_head", "model.embed_tokens"]
    assert Hqq.entries({"quantization_config": told}, {name: {} for name in entries}) == entries
    alone = {name: entry for name, entry in entries.items() if "up" in name}
    assert "weight_quant_params" in Hqq.configure({}, alone, [])["quantization_config"]["quant_config"]


def test_a_pickle_of_hqq_is_named_and_never_opened(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "qmodel.pt").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"pickled \(qmodel\.pt\).*never opened"):
        SourceCheckpoint.open(tmp_path)
