"""Layers that other tools wrote, with the weights that those tools decode them to: ours are the same, and we write the same tensors.

`tests/golden/exchange/make_NAME.py` made each file in an environment of the tool's own.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.checkpoints.safetensors_file import TensorEntry, read_header
from bitpress.errors import BitpressError, CheckpointError
from bitpress.exchange.quantized_directory import QuantizedDirectory
from bitpress.exchange.source import HEADERS, DirectoryFormat, StoredLayer
from bitpress.exchange.table import DIRECTORY_FORMATS, READ_ALONE, find_ecosystem
from bitpress.formats import CompressedLayer

GOLDEN = Path(__file__).parents[1] / "golden" / "exchange"
FILES = {
    "awq": ("awq",),
    "bitsandbytes": ("bitsandbytes",),
    "bitsandbytes-int8": ("bitsandbytes_int8",),
    "compressed-tensors": ("compressed_tensors",),
    "hqq": ("hqq",),
    "mlx": ("mlx", "mlx_minimum"),
    "torchao": ("torchao",),
}
FORMATS = DIRECTORY_FORMATS | READ_ALONE
CASES = [(row, file) for row, files in FILES.items() for file in files]
WRITTEN = [(row, file) for row, file in CASES if row in DIRECTORY_FORMATS]
# Units of the last place of float32 that decoded weights may be away, and why: LLM.int8() multiplies by two rounded numbers, we by one.
AWAY = {"bitsandbytes-int8": 2}
# Configurations that say nothing of how a layer is stored: the tensors do.
SAY_NOTHING = ("bitsandbytes", "bitsandbytes-int8", "hqq")
# Layers that are read exactly and written in another way, and why.
WRITTEN_OTHERWISE = {
    "floats.odd_block": "blocks that do not divide the weight are read in smaller ones",
    "nf4_stored": "bytes that are stored as another type",
    "floats": "the same",
    "whole": "how numbers were chosen is not carried over",
    "across": "groups that run over the ends of rows are read in smaller ones",
}
# Layers that are read exactly and not written: their blocks run over the ends of rows, and are read as smaller ones.
NOT_WRITTEN = ("nf4_across", "nf4_nested_across", "nf4_odd")


@cache
def golden(file: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, decoded weights by layers, and what config.json says of quantization."""
    held = load_file(GOLDEN / f"{file}.safetensors")
    told = json.loads((GOLDEN / f"{file}.json").read_text())
    said = {key: text for key, text in read_header(GOLDEN / f"{file}.safetensors")[1].items() if key.endswith(".weight")}
    told = told if told.keys() & {"quantization", "quantization_config"} else {"quantization_config": told}
    decoded = {name.removesuffix(".decoded"): value for name, value in held.items() if name.endswith(".decoded")}
    told |= {HEADERS: said} if said else {}
    return {name: value for name, value in held.items() if not name.endswith(".decoded")}, decoded, told


def write(out: Path, tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> Path:
    out.mkdir(exist_ok=True)
    own = dict(told)
    headers = own.pop(HEADERS, None)
    headers = headers if isinstance(headers, dict) and all(isinstance(text, str) for text in headers.values()) else None
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors", headers)
    return configure(out, own)


def configure(out: Path, told: Mapping[str, Any]) -> Path:
    config = {key: value for key, value in told.items() if key != HEADERS}
    (out / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return out


def of_layer(tensors: Mapping[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{layer}."): value for name, value in tensors.items() if name.startswith(f"{layer}.")}


def entry_of(name: str, value: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, {torch.uint8: "U8"}.get(value.dtype, "BF16"), tuple(value.shape), 0, 0)


@pytest.mark.parametrize(("row", "file"), CASES)
def test_a_checkpoint_of_the_tool_is_read_as_the_tool_reads_it(row: str, file: str, tmp_path: Path) -> None:
    tensors, decoded, told = golden(file)
    path = write(tmp_path / "model", tensors, told)
    assert find_ecosystem(path) == row
    source = QuantizedDirectory.open(path, FORMATS[row])
    assert source.layers.keys() == decoded.keys()
    for name, expected in decoded.items():
        layer = source.read(f"{name}.weight")
        assert isinstance(layer, CompressedLayer)
        got = layer.weight.dequantize().to(expected.dtype)
        torch.testing.assert_close(got, expected, rtol=AWAY.get(row, 0) * 2.0**-23, atol=0)
        assert source.parameters[f"{name}.weight"].shape == tuple(expected.shape), name


@pytest.mark.parametrize(("row", "file"), WRITTEN)
def test_a_layer_is_written_as_the_tool_wrote_it(row: str, file: str, tmp_path: Path) -> None:
    tensors, decoded, told = golden(file)
    form = FORMATS[row]
    source = QuantizedDirectory.open(write(tmp_path / "model", tensors, told), form)
    entries: dict[str, Mapping[str, Any]] = {}
    for name in decoded:
        layer = source.read(f"{name}.weight")
        assert isinstance(layer, CompressedLayer)
        assert (form.refuses(layer.weight.spec(), layer.input_spec()) is not None) == (name in NOT_WRITTEN), name
        if name in NOT_WRITTEN:
            continue
        stored = form.write(layer)
        entries[name] = json.loads(json.dumps(dict(stored.entry)))
        again = form.read(StoredLayer(stored.tensors, entries[name]))
        assert again.weight.spec() == layer.weight.spec()
        assert again.input_spec() == layer.input_spec()
        assert all(torch.equal(value, again.tensors()[leaf]) for leaf, value in layer.tensors().items()), name
        if name in WRITTEN_OTHERWISE:
            continue
        expected = of_layer(tensors, name)
        assert stored.tensors.keys() == expected.keys(), name
        for leaf, value in expected.items():
            got = stored.tensors[leaf]
            assert (got.dtype, got.shape) == (value.dtype, value.shape), (name, leaf)
            assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), (name, leaf)
    config = form.configure(form.plain(source.source.config), entries, [])
    read = form.entries(json.loads(json.dumps(config)), {name: source.layers[name] for name in entries})
    assert {name: json.loads(json.dumps(dict(entry))) for name, entry in read.items()} == entries


def damaged(value: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors in the place of one: of another type, with another shape, of numbers beyond all bounds."""
    other = torch.uint8 if value.dtype != torch.uint8 else torch.float32
    loud = torch.full_like(value.float(), 3e38).to(value.dtype) if value.is_floating_point() else value.clone().fill_(-1 & 127)
    return [value.to(other), value[:-1] if value.ndim else value[None], value[None], value.flatten(), loud, value.new_zeros(())]


@pytest.mark.parametrize(("row", "file"), CASES)
def test_damaged_tensors_are_refused_or_another_weight_and_never_a_crash(row: str, file: str, tmp_path: Path) -> None:
    tensors, decoded, told = golden(file)
    form: type[DirectoryFormat] = FORMATS[row]
    entries = QuantizedDirectory.open(write(tmp_path / "model", tensors, told), form).entries
    refused: list[str] = []
    for name in decoded:
        whole = of_layer(tensors, name)
        attacks = [{leaf: other for leaf, other in whole.items() if leaf != gone} for gone in whole]
        attacks += [{**whole, leaf: other} for leaf, value in whole.items() for other in damaged(value)]
        for attack in attacks:
            try:
                form.shape(entries[name], {leaf: entry_of(leaf, value) for leaf, value in attack.items()}, attack.__getitem__)
                form.read(StoredLayer(attack, entries[name])).weight.dequantize()
            except BitpressError as error:
                refused.append(str(error))
    assert len(refused) > 3 * len(decoded)
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize(("row", "file"), CASES)
def test_absurd_settings_are_refused_in_one_line(row: str, file: str, tmp_path: Path) -> None:
    """Every number, name and list of the configuration in turn becomes something else; the layers that this concerns are read."""
    tensors, decoded, told = golden(file)
    form = FORMATS[row]
    root = write(tmp_path / "model", tensors, told)
    usual = QuantizedDirectory.open(root, form).entries
    count, refused = 0, list[str]()
    for changed in changes(told):
        if not form.claims({"model_type": "llama", **changed}):
            continue
        count += 1
        try:
            same_headers = changed.get(HEADERS) == told.get(HEADERS)
            path = configure(root, changed) if same_headers else write(root, tensors, changed)
            source = QuantizedDirectory.open(path, form)
            for name in decoded:
                if name in source.layers and source.entries[name] != usual[name]:
                    source.read(f"{name}.weight")
        except CheckpointError as error:
            refused.append(str(error))
    assert count
    assert len(refused) > count / 4 or row in SAY_NOTHING
    assert not any("\n" in line for line in refused)


def changes(value: Any) -> list[Any]:
    """Return copies of a JSON value, each with one part replaced."""
    if isinstance(value, dict):
        return [{**value, key: other} for key, part in value.items() for other in changes(part)]
    if isinstance(value, list):
        return [[*value[:i], other, *value[i + 1 :]] for i, part in enumerate(value) for other in changes(part)] + [{}, 7]
    return [-1, 1 << 40, "other", [], {"a": 1}, None] if not isinstance(value, bool) else [3, "other"]
