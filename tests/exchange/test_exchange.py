"""Sources of every ecosystem: what is written is read back as it was, and a new ecosystem is two files."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.export_directory import DirectoryExporter
from bitpress.exchange.gguf import Gguf
from bitpress.exchange.plain_layer import make_plain, plain_layer, unpack_plain
from bitpress.exchange.source import LayerFormat, ReadTensor, StoredLayer
from bitpress.exchange.table import ECOSYSTEMS, EXPORTERS, LAYER_FORMATS, Directories, open_source
from bitpress.formats import (
    MAPS,
    TERMS,
    ActivationFormat,
    Affine,
    CompressedLayer,
    CompressedWeight,
    Map,
    Packed,
    Term,
    parse_format,
)
from bitpress.formats.maps.map import Chain, Permutation, Scale
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.formats.maps.rotations import Hadamard, Kronecker
from bitpress.formats.terms.dfloat11 import dfloat11
from bitpress.formats.terms.kept import keep_columns
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.sign_low_rank import sign_low_rank
from bitpress.formats.terms.sparse import sparse
from bitpress.pipeline.exporting import export_model

OUT, IN = 8, 24


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def packed(w: torch.Tensor, name: str = "int4-g8-zero-s4") -> Packed:
    fmt = parse_format(name)
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
    "affine": lambda: Affine(torch.eye(2) + 0.1 * draw(2, 2), torch.eye(IN // 2)),
    "reassembly": lambda: Reassembly(
        torch.tensor([1, *range(1, IN)], dtype=torch.int32), torch.tensor([2, *range(1, IN)], dtype=torch.int32)
    ),
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
    "term zeros": lambda: CompressedLayer(CompressedWeight((packed(draw(OUT, IN), "int4-g8-zero"),))),
    "term floats": lambda: CompressedLayer(CompressedWeight((packed(draw(OUT, 64), "nf4-g64-dq"),))),
    "term groups": lambda: CompressedLayer(CompressedWeight((packed(draw(OUT, 64), "int4-g64"),))),
    "term bytes": lambda: CompressedLayer(CompressedWeight((packed(draw(OUT, IN), "int8-row"),))),
    "term blocks": lambda: CompressedLayer(CompressedWeight((packed(draw(OUT, 64), "q4_0"),))),
    "all": lambda: CompressedLayer(
        CompressedWeight((packed(draw(IN, IN)), low_rank(draw(IN, IN), 1)), MAP["chain"](), MAP["scale"]()), inputs("e4m3-g8")
    ),
}


def check_law(row: type[LayerFormat]) -> set[str]:
    """Return the names of LAYERS that an ecosystem can hold: `read(write(layer))` is each of them, and it refuses the others."""
    held = set()
    for name, make in LAYERS.items():
        layer = make()
        try:
            stored = row.write(layer)
        except FormatError:
            continue
        held.add(name)
        entry = json.loads(json.dumps(dict(stored.entry)))
        again = row.read(StoredLayer({n: t.clone() for n, t in stored.tensors.items()}, entry))
        if row is Gguf and name == "term groups":  # its groups are of 32: larger ones come back as several with equal scales
            assert torch.equal(again.weight.dequantize(), layer.weight.dequantize())
            continue
        assert again.weight.spec() == layer.weight.spec(), name
        assert again.input_spec() == layer.input_spec(), name
        assert again.tensors().keys() == layer.tensors().keys(), name
        for tensor, value in layer.tensors().items():
            got = again.tensors()[tensor]
            assert torch.equal(value, got), (name, tensor)
            assert value.dtype == got.dtype, (name, tensor)
        assert torch.equal(again.weight.dequantize(), layer.weight.dequantize()), name
        with pytest.raises(FormatError):
            row.read(StoredLayer({}, stored.entry))
        with pytest.raises(FormatError):
            row.read(StoredLayer(stored.tensors, {**stored.entry, "more": 1}))
    return held


@pytest.mark.parametrize("name", LAYER_FORMATS)
def test_what_is_written_is_read_back_as_it_was(name: str) -> None:
    held = check_law(LAYER_FORMATS[name])
    assert held
    assert name != "bitpress" or held == LAYERS.keys(), "our own directories hold every layer"


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


class Signed:
    """A made-up tool: a directory of signed bytes with a scale for every row, named by `quant_method`.

    tensors   NAME.weight_q int8 [out, in], NAME.weight_s fp16 [out, 1]; other parameters as they are
    entry     {"bits": 8}
    """

    about: ClassVar[str] = "a directory of signed bytes"
    tables: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset({"weight_q", "weight_s"})
    suffixes: ClassVar[frozenset[str]] = marks
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        return bool(config.get("quantization_config", {}).get("quant_method") == "signed")

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        return {name: {"bits": 8} for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        rows, columns = tensors["weight_q"].shape
        return rows, columns

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        return {**config, "quantization_config": {"quant_method": "signed"}}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        if isinstance(plain, str):
            return plain
        return None if plain.format.name == "int8-row" and not plain.ordered else "signed bytes are int8-row without maps"

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        return "int8-row"

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        if (why := Signed.refuses(layer.weight.spec(), layer.input_spec())) is not None:
            raise FormatError(f"{why}.")
        _, codes, params, _ = unpack_plain(layer)
        return StoredLayer({"weight_q": (codes.int() - 128).to(torch.int8), "weight_s": params["scale"].half()}, {"bits": 8})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        if stored.entry != {"bits": 8} or stored.tensors.keys() != {"weight_q", "weight_s"}:
            raise FormatError("signed bytes are weight_q and weight_s, of 8 bits.")
        codes = (stored.tensors["weight_q"].int() + 128).to(torch.uint8)
        return make_plain(parse_format("int8-row"), codes, {"scale": stored.tensors["weight_s"].float()})


def write_signed(source: Path, out: Path) -> dict[str, CompressedLayer]:
    """Write a model's directory as the made-up tool would, its matrices compressed; return those."""
    fmt, stored, layers = parse_format("int8-row"), {}, {}
    for name, w in load_file(source / "model.safetensors").items():
        if w.ndim != 2:
            stored[name] = w
            continue
        params = fmt.fit(w.float())
        layers[name] = CompressedLayer(CompressedWeight((Packed.pack(fmt, fmt.encode(w.float(), params), params),)))
        parts = Signed.write(layers[name]).tensors
        stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "signed"}}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(stored, out / "model.safetensors")
    return layers


def test_a_made_up_ecosystem_is_two_files(
    tiny_model: Callable[..., Path], pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files to touch for a new ecosystem: 2, its own (the class above) and the table (the row whose doing the next lines are)."""
    original, path = tiny_model("llama"), tmp_path / "signed"
    layers = write_signed(original, path)
    with pytest.raises(CheckpointError, match="no checkpoint that can be read here"):
        open_source(path)
    monkeypatch.setitem(ECOSYSTEMS, "signed", Directories(Signed))
    monkeypatch.setitem(LAYER_FORMATS, "signed", Signed)
    monkeypatch.setitem(EXPORTERS, "signed", DirectoryExporter(Signed))
    source, plain = open_source(path), load_file(original / "model.safetensors")
    assert set(source.names) == set(plain)
    for name in source.names:
        value = source.read(name)
        assert isinstance(value, CompressedLayer) == (name in layers)
        if isinstance(value, CompressedLayer):
            assert torch.equal(value.weight.dequantize(), layers[name].weight.dequantize())
        else:
            assert torch.equal(value, plain[name])
    assert check_law(LAYER_FORMATS["signed"]) == {"term bytes"}
    for other in (original, pressed_original, path):
        assert sum(ecosystem.owns(other) for ecosystem in ECOSYSTEMS.values()) == 1
    out = tmp_path / "again"
    exported = export_model(path, out, "signed")  # imported, then exported: the same tensors
    assert {fate.how for fate in exported.fates.values()} == {"exact"}
    stored, again = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in stored.items())
