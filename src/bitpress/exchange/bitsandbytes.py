"""bitsandbytes checkpoints of 4 bits: NF4 and FP4 in blocks, with and without quantized scales.

    X.weight                                 uint8 [out * in / 2, 1]: two codes in a byte, the first in its high half, rows one after the other
    X.weight.absmax                          float32 [blocks], or uint8 where scales are quantized themselves
    X.weight.quant_map                       float32 [16]: the levels
    X.weight.nested_absmax, nested_quant_map float32 [blocks / 256], float32 [256]
    X.weight.quant_state.bitsandbytes__nf4   uint8: JSON of quant_type, blocksize, dtype, shape and of the nested blocksize, dtype, offset

    nf4-gN-fp32, fp4bnb-gN-fp32              N the blocksize, which divides the inputs
    nf4-gN-dq, fp4bnb-gN-dq                  with nested scales in blocks of 256

Blocks that run over the ends of rows are read in smaller groups with equal scales. Nested scales that are below 0, or in other blocks, are
read as the float32 numbers that they stand for.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.jsonfile import parse_json
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.flags import read_flag
from bitpress.exchange.plain_layer import PlainLayer, make_packed, plain_layer
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.formats import Block, CompressedLayer, Format, Packed, parse_format
from bitpress.formats.double_quantized import dynamic_map
from bitpress.formats.grids.levels import Levels
from bitpress.formats.layouts.dense import pack

__all__ = ["Bitsandbytes", "skipped_modules"]

_GRIDS = {"nf4": "nf4", "fp4": "fp4bnb"}
_STATES = {f"weight.quant_state.bitsandbytes__{name}": name for name in _GRIDS}
_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = 256
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_LARGEST_STATE = 4096


class Bitsandbytes:
    about: ClassVar[str] = "bitsandbytes' NF4 and FP4"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset({"weight", "weight.absmax"})
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES}
    )
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return (
            isinstance(settings, dict)
            and settings.get("quant_method") == "bitsandbytes"
            and settings.get("load_in_8bit") is not True
        )

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        for name in ("load_in_4bit", "load_in_8bit"):  # the layers say which of the two they are
            read_flag(config["quantization_config"], name, False)
        return {name: {} for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        return _State.read({leaf: read(leaf) for leaf in tensors if leaf in _STATES}).shape

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",  # the state of every layer says its own
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": str(config.get("dtype", "bfloat16")),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped_modules(entries, plain),
        }
        return {**config, "quantization_config": settings}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        return plain if isinstance(plain, str) else _refuses(plain)

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        fits = [size for size in _SIZES if size >= 64 and shape[1] % size == 0]
        return f"nf4-g{fits[0]}-fp32" if fits and bits >= 4 else None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        refused = Bitsandbytes.refuses(layer.weight.spec(), layer.input_spec())
        if refused is not None:
            raise FormatError(f"{refused}.")
        term = layer.weight.terms[0]
        assert isinstance(term, Packed)
        if term.parts > 1:
            raise FormatError("it is a stack of matrices, which are stored one by one.")
        assert isinstance(term.format.grid, Levels)
        name = next(name for name, grid in _GRIDS.items() if grid == term.format.grid.name)
        nested = term.format.scale == "dq"
        told: dict[str, Any] = {"quant_type": name, "blocksize": term.format.block.cols, "dtype": "bfloat16"}
        told["shape"] = list(term.shape)
        stored = {
            "weight": pack(term.unpack_codes().flatten().view(-1, 2).flip(1).flatten()[None], 4).view(-1, 1),
            "weight.absmax": term.tensors["scale"].flatten(),
            "weight.quant_map": torch.tensor([level or 0.0 for level in term.format.grid.levels]),  # without a negative zero
        }
        if nested:
            stored |= {"weight.nested_absmax": term.tensors["scale_block"], "weight.nested_quant_map": dynamic_map().clone()}
            told |= {
                "nested_blocksize": _NESTED,
                "nested_dtype": "float32",
                "nested_offset": float(term.tensors["scale_offset"]),
            }
        key = f"weight.quant_state.bitsandbytes__{name}"
        return StoredLayer(stored | {key: torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)}, {})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        if stored.entry:
            raise FormatError(f"the configuration of bitsandbytes says nothing of a layer, and here {sorted(stored.entry)}.")
        tensors = stored.tensors
        state = _State.read({leaf: value for leaf, value in tensors.items() if leaf in _STATES})
        nested = {"weight.nested_absmax", "weight.nested_quant_map"} if state.nested else set()
        needed = {"weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{state.kind}"} | nested
        if tensors.keys() != needed:
            raise FormatError(f"a layer of bitsandbytes has {sorted(needed)}, not {sorted(tensors)}.")
        (out, width), size = state.shape, state.blocksize
        grid = parse_format(f"{_GRIDS[state.kind]}-row").grid
        assert isinstance(grid, Levels)
        levels = tensors["weight.quant_map"]
        if levels.shape != (16,) or not torch.equal(levels.float(), torch.tensor(grid.levels, dtype=torch.float32)):
            raise FormatError(f"weight.quant_map holds other levels than those of {state.kind}.")
        codes = _codes(tensors["weight"], out * width)
        scales = _scales(state, tensors)
        if isinstance(scales, torch.Tensor):
            group = math.gcd(size, width)
            of = torch.arange(0, out * width, group) // size
            fmt, parts = Format(grid, Block(1, group), "fp32"), {"scale": scales[of].view(out, -1).contiguous()}
        else:
            fmt, parts = Format(grid, Block(1, size), "dq"), scales
        return make_packed(fmt, (out, width), {**parts, "codes": pack(codes.view(out, width), 4)})


def skipped_modules(entries: Collection[str], plain: Collection[str]) -> list[str]:
    """Return the layers that bitsandbytes leaves as they are: transformers would make layers of its own of all others."""
    return sorted({*plain, "lm_head"} - set(entries))


@dataclass(frozen=True)
class _State:
    """The JSON beside a weight."""

    kind: str
    blocksize: int
    shape: tuple[int, int]
    nested: bool
    offset: float = 0.0
    nested_blocksize: int = _NESTED

    @classmethod
    def read(cls, stored: Mapping[str, torch.Tensor]) -> "_State":
        if len(stored) != 1:
            raise FormatError(f"a layer has one weight.quant_state, of {' or '.join(_GRIDS)}; this one has {len(stored)}.")
        name, octets = next(iter(stored.items()))
        if octets.dtype != torch.uint8 or octets.ndim != 1 or octets.numel() > _LARGEST_STATE:
            raise FormatError(f"{name} is {octets.dtype} {list(octets.shape)} where bytes of JSON are needed.")
        try:
            told = parse_json(bytes(octets.tolist()), name)
        except CheckpointError as error:
            raise FormatError(str(error)) from error
        if not isinstance(told, dict) or told.keys() - _KEYS not in (set(), _NESTED_KEYS) or not told.keys() >= _KEYS:
            keys = sorted(told) if isinstance(told, dict) else told
            raise FormatError(f"{name} holds {keys!r}; {sorted(_KEYS)} are known, and {sorted(_NESTED_KEYS)}.")
        shape, size = told["shape"], told["blocksize"]
        if told["quant_type"] != _STATES[name] or type(size) is not int or size not in _SIZES:
            raise FormatError(f"{name} says quant_type {told['quant_type']!r}, blocksize {size!r}; blocks are of 32 to 4096.")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
            raise FormatError(f"{name} says the shape {shape!r} where that of a matrix is needed.")
        if "nested_offset" not in told:
            return cls(_STATES[name], size, (shape[0], shape[1]), nested=False)
        offset, inner = told["nested_offset"], told["nested_blocksize"]
        if (
            type(inner) is not int
            or not 1 <= inner <= 1 << 20
            or not isinstance(offset, (int, float))
            or isinstance(offset, bool)
        ):
            raise FormatError(f"{name} says nested_blocksize {inner!r}, nested_offset {offset!r}.")
        return cls(_STATES[name], size, (shape[0], shape[1]), nested=True, offset=float(offset), nested_blocksize=inner)


def _codes(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Return all codes of a weight, whose bytes may be stored as another type."""
    octets = weight.contiguous().flatten().view(torch.uint8)
    if octets.numel() * 2 - count not in range(2 * weight.element_size()):
        raise FormatError(f"weight holds {octets.numel() * 2} codes where {count} are needed.")
    return torch.stack([octets >> 4, octets & 15], dim=1).flatten()[:count]


def _scales(state: _State, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return one float32 a block, or the tensors of our store `dq` where it holds the same."""
    absmax, (out, width) = tensors["weight.absmax"], state.shape
    count = -(-out * width // state.blocksize)
    wanted = torch.uint8 if state.nested else torch.float32
    if absmax.dtype != wanted or absmax.numel() != count:
        raise FormatError(f"weight.absmax is {absmax.dtype} {list(absmax.shape)} where {wanted} {[count]} is needed.")
    absmax = absmax.flatten()
    if not state.nested:
        return absmax
    block, levels = tensors["weight.nested_absmax"].flatten(), tensors["weight.nested_quant_map"].flatten()
    blocks = -(-count // state.nested_blocksize)
    if block.dtype != torch.float32 or levels.dtype != torch.float32 or block.numel() != blocks or levels.numel() != 256:
        raise FormatError(
            f"weight.nested_absmax is {block.dtype} {list(block.shape)} where {blocks} float32 are needed, with 256 levels."
        )
    offset = torch.tensor(state.offset, dtype=torch.float32)
    scales = levels[absmax.long()] * block.repeat_interleave(state.nested_blocksize)[:count] + offset
    ours = torch.equal(levels, dynamic_map()) and state.nested_blocksize == _NESTED and width % state.blocksize == 0
    if not ours or bool((scales < 0).any()):
        return scales
    return {"scale": absmax.view(out, -1), "scale_block": block, "scale_offset": offset.reshape(1)}


def _refuses(plain: PlainLayer) -> str | None:
    fmt = plain.format
    if fmt.grid.name not in _GRIDS.values() or fmt.layout != "dense" or fmt.scale not in ("fp32", "dq"):
        return f"{fmt.name} is not a format of bitsandbytes, which has nf4 and fp4bnb with scales fp32 or dq"
    if fmt.block.rows != 1 or fmt.block.cols not in _SIZES:
        return f"{fmt.name}: bitsandbytes has blocks of {', '.join(map(str, _SIZES))}"
    return "its inputs go through a map when the model runs (permutation)" if plain.ordered else None
