"""GGUF files, of one part or several: weights by blocks with their codes, one tensor in memory at a time.

    types that are formats here   `exchange.gguf_blocks`: codes, scales and minima bit for bit
    F32 F16 BF16 F64              tensors as they are
    IQ1, IQ2, IQ3                 decoded by the `gguf` package, in float32

Names are transformers' (`exchange.gguf_names`). Rows that llama.cpp keeps in pairs are put back in order, with their codes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.durable import open_regular, read_into
from bitpress.checkpoints.gguf_file import load_gguf_config, load_gguf_tokenizer, tokenizer_problem
from bitpress.checkpoints.gguf_header import GgufHeader, GgufTensor
from bitpress.checkpoints.gguf_parts import find_parts
from bitpress.checkpoints.named import known_hash
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import BitpressError, CheckpointError, FormatError
from bitpress.exchange.gguf_blocks import BLOCK_TYPES, read_blocks, write_blocks
from bitpress.exchange.gguf_metadata import frequency_tensors
from bitpress.exchange.gguf_names import ARCHITECTURES, Architecture, order_from_pairs
from bitpress.exchange.plain_layer import PlainLayer, plain_layer, unpack_plain
from bitpress.exchange.source import Source, StoredLayer
from bitpress.formats import CompressedLayer, CompressedWeight, Packed, parse_format

__all__ = ["Gguf", "GgufSource", "block_type", "move_rows"]

_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.bfloat16: "BF16"}
_BY_NUMBER = {kind.number: name for name, kind in BLOCK_TYPES.items()}
# What a file may hold beside parameters: divisors of the frequencies of rotations, as every Llama from 3.1 on has them.
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class _Place:
    """Where a parameter is stored: a tensor of a part, or one expert of it; `rows` in the order of transformers, if it is another."""

    part: int
    name: str
    tensor: GgufTensor
    expert: int | None = None
    heads: int | None = None
    shifted: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.tensor.shape[::-1]
        return whole if self.expert is None else whole[1:]

    @property
    def compressed(self) -> bool:
        return self.tensor.kind in _BY_NUMBER and len(self.shape) == 2


@dataclass(frozen=True)
class GgufSource:
    """A model in GGUF: the parts with their headers, transformers' configuration, and where every parameter is."""

    parts: tuple[tuple[Path, GgufHeader], ...]
    config: Mapping[str, Any]
    places: Mapping[str, _Place]

    @classmethod
    def open(cls, path: Path) -> "GgufSource":
        """Open a file, or the model that a part belongs to. Raises CheckpointError."""
        parts = find_parts(path)
        metadata = parts[0][1].metadata
        name = metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: is a model of llama.cpp's architecture {str(name)[:40]!r}; its codes can be read of "
                f"{', '.join(ARCHITECTURES)}. `bitpress quantize` takes other ones, decoded."
            )
        config = load_gguf_config(parts)
        return cls(parts, config, _find_places(path, parts, ARCHITECTURES[name], config))._with_frequencies()

    def _with_frequencies(self) -> "GgufSource":
        """Return the model with the scaling of rotations that stands in a tensor of its own. Raises CheckpointError for an unknown one."""
        for part, (path, header) in enumerate(self.parts):
            if _FREQUENCIES not in header.tensors:
                continue
            place = _Place(part, _FREQUENCIES, header.tensors[_FREQUENCIES])
            values = _values(self._bytes(place), place).float()
            rope = {**(self.config.get("rope_parameters") or {}), **_LLAMA3, "factor": float(values.max())}
            config = {**self.config, "rope_parameters": rope}
            wanted = frequency_tensors(config)[_FREQUENCIES]
            if wanted.shape != values.shape or not torch.allclose(values, wanted, rtol=1e-4):
                raise CheckpointError(
                    f"{path}: {_FREQUENCIES} scales rotations in another way than Llama 3; use the original model."
                )
            return replace(self, config=config)
        return self

    @property
    def path(self) -> Path:
        return self.parts[0][0]

    @property
    def names(self) -> Collection[str]:
        return self.places.keys()

    @cached_property
    def parameters(self) -> Mapping[str, TensorEntry]:
        return {
            name: TensorEntry(name, _DTYPES.get(_PLAIN.get(place.tensor.kind, torch.float32), "F32"), place.shape, 0, 0)
            for name, place in self.places.items()
        }

    def hashes(self) -> Mapping[str, str]:
        return {f"{i + 1}.gguf": known_hash(path) for i, (path, _) in enumerate(self.parts)}

    @property
    def tokenizer_problem(self) -> str | None:
        """Say why the tokenizer cannot be rebuilt; None if it can."""
        return tokenizer_problem(self.path, self.parts[0][1])

    def side_files(self) -> Mapping[str, bytes]:
        """Return the tokenizer's files; none where it cannot be rebuilt."""
        return {} if self.tokenizer_problem else load_gguf_tokenizer(self.path, self.parts[0][1], self.config)

    def read(self, name: str) -> torch.Tensor | CompressedLayer:
        """Read one parameter, a compressed one with its codes. Raises CheckpointError."""
        if name not in self.places:
            raise CheckpointError(f"{self.path}: holds no {name!r}.")
        place = self.places[name]
        raw = self._bytes(place)
        try:
            if place.compressed:
                packed = read_blocks(_BY_NUMBER[place.tensor.kind], raw, self._factor(place))
                return CompressedLayer(CompressedWeight((_ordered(packed, place.heads),)))
            values = _values(raw, place)
        except BitpressError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.path}: {name} holds a NaN or an infinity.")
        if place.heads is not None:
            values = values[order_from_pairs(len(values), place.heads)]
        return values - 1 if place.shifted else values

    def _factor(self, place: _Place) -> float:
        """Return the scale of a whole tensor of NVFP4, which stands beside it."""
        beside = f"{place.name.removesuffix('.weight')}.scale"
        for part, (_, header) in enumerate(self.parts):
            if beside in header.tensors:
                tensor = header.tensors[beside]
                values = _values(self._bytes(_Place(part, beside, tensor)), _Place(part, beside, tensor)).flatten()
                return float(values[place.expert or 0])
        return 1.0

    def _bytes(self, place: _Place) -> torch.Tensor:
        """Read the bytes of a tensor, or of one expert of it: `[rows, bytes of a row]`."""
        path, header = self.parts[place.part]
        rows = 1
        for size in place.shape[:-1]:
            rows *= size
        count = place.tensor.nbytes // (place.tensor.shape[-1] if place.expert is not None else 1)
        start = header.data_start + place.tensor.offset + count * (place.expert or 0)
        raw = bytearray(count)
        with open_regular(path) as (descriptor, _):
            read_into(path, descriptor, memoryview(raw), start)
        return torch.frombuffer(raw, dtype=torch.uint8).view(rows, -1)


def _find_places(
    path: Path, parts: tuple[tuple[Path, GgufHeader], ...], architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, _Place]:
    """Return where every parameter is. Raises CheckpointError for a tensor that belongs to no parameter."""
    places: dict[str, _Place] = {}
    heads = {"q": config["num_attention_heads"], "k": config.get("num_key_value_heads") or config["num_attention_heads"]}
    tensors = {name: (part, tensor) for part, (_, header) in enumerate(parts) for name, tensor in header.tensors.items()}
    for name, (part, tensor) in tensors.items():
        ours = architecture.ours(name)
        if name == _FREQUENCIES or (name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in tensors):
            continue
        if ours is None or (name == "output.weight" and config.get("tie_word_embeddings")):
            raise CheckpointError(f"{path}: the tensor {name[:80]!r} is no parameter of a {config['model_type']} model here.")
        place = _Place(part, name, tensor, shifted=architecture.shifts(name))
        if architecture.moves_rows(name):
            count = heads[name.split(".")[2][5]]
            if place.shape[0] % (2 * count):
                raise CheckpointError(f"{path}: {name}: {place.shape[0]} rows are not those of {count} heads.")
            place = replace(place, heads=count)
        if "{e}" in ours:
            if len(tensor.shape) != 3:
                raise CheckpointError(f"{path}: {name} has {len(tensor.shape)} dimensions where experts are stacked in 3.")
            for expert in range(tensor.shape[2]):
                places[ours.replace("{e}", str(expert))] = replace(place, expert=expert)
        else:
            places[ours] = place
    return places


def _values(raw: torch.Tensor, place: _Place) -> torch.Tensor:
    """Return the values of a tensor that stays a tensor. Raises FormatError."""
    kind = place.tensor.kind
    if kind in _PLAIN:
        return raw.view(-1).view(_PLAIN[kind]).view(place.shape)
    if kind in _BY_NUMBER:
        return read_blocks(_BY_NUMBER[kind], raw).dequantize().view(place.shape)
    import gguf

    name = gguf.GGMLQuantizationType(kind)
    try:
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), name)).float().view(place.shape)
    except NotImplementedError as error:
        raise FormatError(f"its type {name.name} is not one of a weight.") from error


def _ordered(packed: Packed, heads: int | None) -> Packed:
    """Put the rows of a weight back in order."""
    if heads is None:
        return packed
    return move_rows(packed, order_from_pairs(packed.shape[0], heads))


def move_rows(packed: Packed, order: torch.Tensor) -> Packed:
    """Return a weight with its rows in another order; blocks must be parts of rows."""
    tensors = {name: t if name.endswith("_tensor") else t[order].contiguous() for name, t in packed.tensors.items()}
    return Packed(packed.format, packed.shape, tensors)


# ---- layers ----


def block_type(plain: PlainLayer) -> str | None:
    """Return the type of blocks that holds a layer of this format as it is, or with the scale of a larger group repeated; None if none."""
    for name, kind in BLOCK_TYPES.items():
        if plain.format == parse_format(kind.format):
            return name
    fmt = plain.format
    if fmt.block.rows != 1 or fmt.scale != "fp16" or fmt.layout != "dense":
        return None
    cols = fmt.block.resolve(plain.shape, 1)[1]
    held = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
    return next((n for n in held if parse_format(BLOCK_TYPES[n].format).grid == fmt.grid and cols % 32 == 0), None)


class Gguf:
    """GGUF as an ecosystem, and its blocks as a way to store layers: rows of bytes, and the type's name.

    A layer with larger groups than a type's is stored with their scales repeated: the same codes and values, in the type's own format.
    """

    about: ClassVar[str] = "a .gguf file of llama.cpp; weights keep their codes"
    tables: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = True

    @staticmethod
    def owns(path: Path) -> bool:
        return path.is_file() and path.suffix.lower() == ".gguf"

    @staticmethod
    def open(path: Path) -> Source:
        return GgufSource.open(path)

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        if isinstance(plain, str):
            return plain
        if plain.ordered:
            return "its inputs are taken in another order"
        name = block_type(plain)
        if name is None:
            return f"{plain.format.name} is no type of GGUF, whose types here are {', '.join(BLOCK_TYPES)}"
        if plain.shape[1] % BLOCK_TYPES[name].weights:
            return f"rows of {plain.shape[1]} are not whole blocks of {name}, of {BLOCK_TYPES[name].weights} weights"
        return None

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        """Return the format of the best type with at most half a bit more whose blocks fill the rows."""
        order = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "IQ4_NL", "Q4_0", "Q3_K", "Q2_K")
        fits = [name for name in order if shape[1] % BLOCK_TYPES[name].weights == 0]
        return next(
            (BLOCK_TYPES[n].format for n in fits if BLOCK_TYPES[n].bits <= bits + 0.5),
            BLOCK_TYPES[fits[-1]].format if fits else None,
        )

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        plain, codes, params, order = unpack_plain(layer)
        refused = Gguf.refuses(layer.weight.spec(), layer.input_spec())
        name = block_type(plain)
        if refused is not None or name is None or order is not None:
            raise FormatError(f"{refused}.")
        term = layer.weight.terms[0]
        assert isinstance(term, Packed)
        fmt = parse_format(BLOCK_TYPES[name].format)
        if term.format != fmt:
            times = plain.format.block.resolve(plain.shape, 1)[1] // 32
            term = Packed.pack(fmt, codes, {key: t.repeat_interleave(times, 1) for key, t in params.items()})
        tensors = {"blocks": write_blocks(name, term)}
        if name == "NVFP4":
            tensors["factor"] = term.tensors["scale_tensor"].reshape(1)
        return StoredLayer(tensors, {"type": name})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        if set(stored.entry) != {"type"} or stored.entry["type"] not in BLOCK_TYPES:
            raise FormatError(f"a layer of GGUF is described by its type, one of {', '.join(BLOCK_TYPES)}.")
        kind, blocks = BLOCK_TYPES[stored.entry["type"]], stored.tensors.get("blocks")
        if (
            blocks is None
            or blocks.dtype != torch.uint8
            or blocks.ndim != 2
            or blocks.numel() == 0
            or blocks.shape[1] % kind.nbytes
        ):
            raise FormatError(f"a layer of GGUF is rows of blocks of {kind.nbytes} bytes.")
        factor = float(stored.tensors["factor"]) if "factor" in stored.tensors else 1.0
        return CompressedLayer(CompressedWeight((read_blocks(stored.entry["type"], blocks, factor),)))
