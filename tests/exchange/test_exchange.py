"""Sources of every ecosystem: what is written is read back as it was, and a new ecosystem is two files."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.source import Source, StoredLayer
from bitpress.exchange.table import ECOSYSTEMS, LAYER_FORMATS, open_source
from bitpress.formats import MAPS, TERMS, ActivationFormat, CompressedLayer, CompressedWeight, Map, Packed, Term, parse_format
from bitpress.formats.maps.map import Chain, Permutation, Scale
from bitpress.formats.maps.rotations import Hadamard, Kronecker
from bitpress.formats.terms.dfloat11 import dfloat11
from bitpress.formats.terms.kept import keep_columns
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.sign_low_rank import sign_low_rank
from bitpress.formats.terms.sparse import sparse

OUT, IN = 8, 24


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def packed(w: torch.Tensor) -> Packed:
    fmt = parse_format("int4-g8-zero-s4")
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


TERM: dict[str, Callable[[torch.Tensor], Term]] = {
    "packed": packed,
    "low_rank": lambda w: low_rank(w, 2),
    "sign_low_rank": lambda w: sign_low_rank(w, 2),
    "sparse": lambda w: sparse(w, w.abs() > 1),
    "kept": lambda w: keep_columns(w, torch.arange(0, IN, 3), parse_format("int4-row"))[0],
    "dfloat11": lambda w: dfloat11(w.bfloat16()),
}
MAP: dict[str, Callable[[], Map]] = {
    "scale": lambda: Scale(draw(IN).abs() + 1),
    "permutation": lambda: Permutation(torch.arange(IN).flip(0).to(torch.int32)),
    "hadamard": lambda: Hadamard.random(IN, 8, torch.Generator().manual_seed(2)),
    "kronecker": lambda: Kronecker.random(IN, torch.Generator().manual_seed(2)),
    "chain": lambda: Chain((Scale(draw(IN).abs() + 1), Hadamard.random(IN, 8, torch.Generator().manual_seed(2)))),
}


def inputs(name: str) -> ActivationFormat:
    fmt = parse_format(name)
    return ActivationFormat.static(fmt, fmt.fit(draw(9, IN))) if "tensor" in name else ActivationFormat(fmt)


LAYERS: dict[str, Callable[[], CompressedLayer]] = {
    **{f"term {kind}": lambda kind=kind: CompressedLayer(CompressedWeight((TERM[kind](draw(OUT, IN)),))) for kind in TERMS},
    **{
        f"map {kind}": lambda kind=kind: CompressedLayer(CompressedWeight((packed(draw(OUT, IN)),), MAP[kind]()))
        for kind in MAPS
    },
    **{
        f"input {name}": lambda name=name: CompressedLayer(CompressedWeight((packed(draw(OUT, IN)),)), inputs(name))
        for name in ("int8-row", "int8-tensor-zero")
    },
    "all": lambda: CompressedLayer(
        CompressedWeight((packed(draw(IN, IN)), low_rank(draw(IN, IN), 1)), MAP["chain"](), MAP["scale"]()), inputs("e4m3-g8")
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", LAYER_FORMATS)
def test_what_is_written_is_read_back_as_it_was(name: str, make: Callable[[], CompressedLayer]) -> None:
    row, layer = LAYER_FORMATS[name], make()
    stored = row.write(layer)
    again = row.read(StoredLayer({n: t.clone() for n, t in stored.tensors.items()}, json.loads(json.dumps(dict(stored.entry)))))
    assert again.weight.spec() == layer.weight.spec()
    assert again.input_spec() == layer.input_spec()
    assert again.tensors().keys() == layer.tensors().keys()
    assert all(torch.equal(t, again.tensors()[n]) and t.dtype == again.tensors()[n].dtype for n, t in layer.tensors().items())
    assert torch.equal(again.weight.dequantize(), layer.weight.dequantize())
    with pytest.raises(FormatError):
        row.read(StoredLayer({}, stored.entry))
    with pytest.raises(FormatError):
        row.read(StoredLayer(stored.tensors, {**stored.entry, "more": 1}))


def test_a_directory_of_our_own_is_read_by_name(pressed_original: Path) -> None:
    source, checkpoint = open_source(pressed_original), CompressedCheckpoint.open(pressed_original)
    assert isinstance(source, CompressedCheckpoint)
    assert set(source.names) == {*checkpoint.plain, *checkpoint.manifest.weights}
    for name in source.names:
        value = source.read(name)
        if isinstance(value, CompressedLayer):
            assert torch.equal(value.weight.dequantize(), checkpoint.read_weight(name).dequantize())
        assert isinstance(value, CompressedLayer) == (name in checkpoint.manifest.weights)


def test_a_directory_of_plain_tensors_is_read_by_name(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    source, expected = open_source(path), load_file(path / "model.safetensors")
    assert set(source.names) == set(expected)
    for name, value in expected.items():
        read = source.read(name)
        assert isinstance(read, torch.Tensor)
        assert torch.equal(read, value)


def test_a_path_of_no_ecosystem_is_refused_in_one_line(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "other"}}')
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(CheckpointError, match=r"no checkpoint that can be read here.*gguf") as error:
            open_source(path)
        assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Column:
    """A source of one layer in a text file: a power of two a row."""

    path: Path

    @property
    def names(self) -> Collection[str]:
        return ["w"]

    def read(self, name: str) -> CompressedLayer:
        w = torch.tensor([[2.0 ** int(line)] for line in self.path.read_text().split()])
        return CompressedLayer(CompressedWeight((sparse(w, w != 0),)))


class MadeUp:
    about: ClassVar[str] = "a .powers file"

    @staticmethod
    def owns(path: Path) -> bool:
        return path.suffix == ".powers"

    @staticmethod
    def open(path: Path) -> Source:
        return Column(path)


def test_a_made_up_ecosystem_is_two_files(
    tiny_model: Callable[..., Path], pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files to touch for a new ecosystem: 2, its own (the classes above) and the table (the line below)."""
    monkeypatch.setitem(ECOSYSTEMS, "powers", MadeUp)
    path = tmp_path / "w.powers"
    path.write_text("1 -2 0")
    source = open_source(path)
    layer = source.read(*source.names)
    assert isinstance(layer, CompressedLayer)
    assert layer.weight.dequantize().flatten().tolist() == [2.0, 0.25, 1.0]
    for other in (tiny_model("llama"), pressed_original, path):
        assert sum(ecosystem.owns(other) for ecosystem in ECOSYSTEMS.values()) == 1
