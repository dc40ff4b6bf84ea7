"""HQQ checkpoints, as transformers 4 and the package hqq write and read them: integers of 1 to 6 and 8 bits with zero points between codes.

    X.W_q          uint8 [groups / N, group]     N codes in a byte: the rows of groups are cut into N parts, the first in the highest bits
                   int32 [groups / 10, group]    of 3 bits: ten parts, the first in bits 27 to 29, the last part filled up with zeros
    X.scale, zero  float16, bfloat16 or float32 [groups, 1]
    X.shape        int64 [2]; X.nbits, group_size, axis int32: they decide
    X.packing      uint8, the letters of 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8 or 1bit_u8
    X.view_as_float, quant_scale, quant_zero, ...     uint8, flags; compute_dtype, unpack_view_dtype are letters too

    w_hat = (code - zero) * scale, groups of a row one after the other, the rows too

    intB-{gN, row}                       where all zero points are 2^(B - 1)
    intB-{gN, row}-zero                  where all are codes
    intB-{gN, row}-zerofp16              where float16 holds all of them, else zerofp32

`quant_config` in config.json repeats bits and group for every kind of layer; here it tells a row from a group of as many inputs alone.
`axis` 0, whose groups are rows far apart, is refused, and so are quantized scales, which hqq itself no longer writes. hqq takes scales and
zero points over into the type that it computes in: load an export in float32 where zero points are wider than scales. Groups that run over
the ends of rows are read in smaller ones.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.bitsandbytes import skipped_modules
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.plain_layer import PlainLayer, make_plain, plain_layer, unpack_plain
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.formats import Block, CompressedLayer, Format, Integer
from bitpress.formats.grids.float_zero import FloatZero

__all__ = ["Hqq"]

# By bits: how codes lie in words, the type of a word, and the places of its codes from the first part of the rows to the last.
_PACKING: dict[int, tuple[str, torch.dtype, tuple[int, ...]]] = {
    **{bits: ("8bit_u8", torch.uint8, (0,)) for bits in (8, 6, 5)},
    4: ("4bit_u8", torch.uint8, (4, 0)),
    3: ("3bit_32", torch.int32, tuple(range(27, -1, -3))),
    2: ("2bit_u8", torch.uint8, (6, 4, 2, 0)),
    1: ("1bit_u8", torch.uint8, tuple(range(7, -1, -1))),
}
_STORES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TYPES = {name: dtype for dtype, name in _STORES.items()}
_NEEDED = frozenset({"W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing"})
# Flags that change what the tensors mean, and the value that is read.
_FLAGS = {"quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "channel_wise": 1}
_IGNORED = frozenset(
    {"compute_dtype", "unpack_view_dtype", "optimize", "round_zero", "encoded_state_dict", "stores_quant_config"}
)


class Hqq:
    about: ClassVar[str] = "HQQ's integers of 1 to 6 and 8 bits with zero points between codes"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset({"W_q"})
    suffixes: ClassVar[frozenset[str]] = _NEEDED | _FLAGS.keys() | _IGNORED | {"view_as_float", "zero_scale"}
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == "hqq"

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        told = config["quantization_config"].get("quant_config")
        if not isinstance(told, dict):
            raise FormatError(
                f"quantization_config: quant_config {str(told)[:60]!r} of HQQ does not say how layers are stored."
            )
        return {name: _entry(name, told) for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        if "shape" not in tensors or math.prod(tensors["shape"].shape) != 2:
            raise FormatError("a layer of HQQ has its shape, two whole numbers.")
        return _shape(read("shape"))

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        counted: dict[str, Counter[tuple[int, int | None]]] = {}
        for name, entry in sorted(entries.items()):
            counted.setdefault(_kind(name), Counter())[entry["nbits"], entry["group_size"]] += 1
        kinds = {kind: _settings(*of.most_common(1)[0][0]) for kind, of in counted.items()}
        several = len({str(settings) for settings in kinds.values()}) > 1
        told = kinds if several else next(iter(kinds.values()))
        settings = {"quant_method": "hqq", "quant_config": told, "skip_modules": skipped_modules(entries, plain)}
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
        for width in (8, 4, 3, 2):
            for group in (64, 128, 32):
                if width <= bits and shape[1] % group == 0 and _fill(width, shape, group):
                    return f"int{width}-g{group}-zerofp16"
        return None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        plain, codes, params, _ = unpack_plain(layer)
        refused = _refuses(plain)
        if refused is not None:
            raise FormatError(f"{refused}.")
        fmt, bits = plain.format, plain.format.grid.code_bits
        group = fmt.block.resolve(plain.shape, 1)[1]
        packing, word, _ = _PACKING[bits]
        dtype, scale = _TYPES[fmt.scale], params["scale"].reshape(-1, 1)
        zero = params["zero"].reshape(-1, 1) if "zero" in params else torch.full(scale.shape, float(1 << bits >> 1))
        # In the type of the scales, which is that of the computation, where that holds them.
        held = torch.equal(zero.to(dtype).float(), zero)
        wide = torch.float32 if fmt.variant == "zerofp32" else torch.float16
        tensors = {
            "W_q": _pack(codes.reshape(-1, group), bits),
            "scale": scale.to(dtype),
            "zero": zero.to(dtype if held else wide),
            "shape": torch.tensor(plain.shape),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in _numbers(bits, group).items()},
            "packing": _letters(packing),
            "unpack_view_dtype": _letters(str(word)),
            "compute_dtype": _letters(str(dtype if held else torch.float32)),
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in (_FLAGS | {"view_as_float": 0}).items()},
            "optimize": torch.tensor(1, dtype=torch.uint8),
            "round_zero": torch.tensor(bits == 4, dtype=torch.uint8),
            "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
            "stores_quant_config": torch.tensor(1, dtype=torch.uint8),
        }
        return StoredLayer(tensors, {"nbits": bits, "group_size": None if fmt.block.cols == "all" else group})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        entry, tensors = stored.entry, stored.tensors
        if not set(entry) <= {"nbits", "group_size"}:
            raise FormatError(f"a layer of HQQ is described by nbits and group_size, not by {sorted(entry)}.")
        _check(tensors)
        out, width = _shape(tensors["shape"])
        bits, group = _number(tensors, "nbits"), _number(tensors, "group_size")
        groups = out * width // group if group > 0 else 0
        if groups * group != out * width:
            raise FormatError(f"group_size {group} does not divide the {out} x {width} weights.")
        codes = _unpack(tensors, bits, groups, group).reshape(out, width)
        scale, zero = tensors["scale"], tensors["zero"]
        for name, value in (("scale", scale), ("zero", zero)):
            if value.dtype not in _STORES or list(value.shape) != [groups, 1]:
                raise FormatError(f"{name} is {value.dtype} {list(value.shape)} where {[groups, 1]} floats are needed.")
        inside = math.gcd(group, width)
        of = torch.arange(0, out * width, inside) // group
        zeros = zero.float().flatten()[of].view(out, -1)
        row = group == width and entry.get("group_size", group) is None
        grid = _grid(bits, zeros)
        symmetric = isinstance(grid, Integer) and not grid.zero
        params = {"scale": scale.float().flatten()[of].view(out, -1)} | ({} if symmetric else {"zero": zeros})
        return make_plain(Format(grid, Block(1, "all" if row else inside), _STORES[scale.dtype]), codes, params)


def _kind(name: str) -> str:
    """Return what HQQ calls a layer in all blocks: `self_attn.q_proj`."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _entry(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of a layer: of all at once, or of each kind by its name; {} where it says nothing."""
    own = told if "weight_quant_params" in told else told.get(_kind(name))
    weights = own.get("weight_quant_params") if isinstance(own, dict) else None
    return {key: weights[key] for key in ("nbits", "group_size") if key in weights} if isinstance(weights, dict) else {}


def _numbers(bits: int, group: int | None) -> dict[str, Any]:
    return {"nbits": bits, "group_size": group, "axis": 1}


def _settings(bits: int, group: int | None) -> dict[str, Any]:
    """Return the configuration of a kind of layer, as hqq's `BaseQuantizeConfig` makes it."""
    flags = {"channel_wise": True, "optimize": True, "round_zero": bits == 4, "view_as_float": False}
    rest = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return {"weight_quant_params": _numbers(bits, group) | flags, **rest}


def _letters(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _number(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    value = tensors[name]
    if value.numel() != 1 or value.dtype not in (torch.uint8, torch.int32, torch.int64):
        told = f" {value.item():g}" if value.numel() == 1 else ""
        raise FormatError(f"{name} is {value.dtype} {list(value.shape)}{told} where one whole number is needed.")
    return int(value)


def _shape(stored: torch.Tensor) -> tuple[int, int]:
    if stored.numel() != 2 or stored.dtype not in (torch.int64, torch.int32):
        raise FormatError(f"shape is {stored.dtype} {list(stored.shape)} where two whole numbers are needed.")
    out, width = (int(size) for size in stored.flatten())
    if not (0 < out < 1 << 31 and 0 < width < 1 << 31):
        raise FormatError(f"shape is {[out, width]}.")
    return out, width


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise FormatError for a layer without what is needed, or whose flags say something else of it."""
    if "zero_scale" in tensors:
        raise FormatError("scales and zero points are one tensor (zero_scale, of offload_meta), which is not read.")
    if missing := sorted(_NEEDED - tensors.keys()):
        raise FormatError(f"a layer of HQQ has {sorted(_NEEDED)}; this one has no {missing[0]}.")
    if unknown := sorted(tensors.keys() - Hqq.suffixes):
        raise FormatError(f"a layer of HQQ has no {unknown[0]}.")
    if (axis := _number(tensors, "axis")) != 1:
        raise FormatError(f"axis {axis} of HQQ: its groups are of rows that lie apart; axis 1 is read.")
    for name, read in _FLAGS.items():
        if name in tensors and (value := _number(tensors, name)) != read:
            raise FormatError(f"{name} {value} of HQQ; {read} is read.")


def _unpack(tensors: Mapping[str, torch.Tensor], bits: int, groups: int, group: int) -> torch.Tensor:
    """Return codes `[groups, group]`."""
    if bits not in _PACKING:
        raise FormatError(f"nbits {bits} of HQQ; it has {', '.join(map(str, sorted(_PACKING)))}.")
    packing, dtype, places = _PACKING[bits]
    letters, words = tensors["packing"], tensors["W_q"]
    if letters.dtype != torch.uint8 or letters.numel() > 16 or letters.flatten().tolist() != list(packing.encode()):
        raise FormatError(f"packing, {letters.dtype} {list(letters.shape)}, is not {packing!r}, as hqq stores {bits} bits.")
    as_floats = "view_as_float" in tensors and _number(tensors, "view_as_float")
    if as_floats and words.is_floating_point() and words.ndim == 2 and words.shape[1] * words.itemsize % dtype.itemsize == 0:
        words = words.contiguous().view(dtype)
    needed = [-(-groups // len(places)), group]
    if words.dtype != dtype or list(words.shape) != needed:
        raise FormatError(f"W_q is {words.dtype} {list(words.shape)} where {dtype} {needed} is needed.")
    if groups % len(places) and bits != 3:
        raise FormatError(f"{groups} groups do not fill the {len(places)} parts of W_q.")
    codes = torch.cat([words >> place & ((1 << bits) - 1) if len(places) > 1 else words for place in places])
    if bits < 8 and bool((codes >= 1 << bits).any()):
        raise FormatError(f"W_q holds a number that {bits} bits do not.")
    return codes[:groups].to(torch.uint8)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return words of codes `[groups, group]`."""
    _, dtype, places = _PACKING[bits]
    rows = codes.to(dtype)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % len(places)))
    words = torch.zeros_like(rows[: len(rows) // len(places)])
    for part, place in zip(rows.chunk(len(places)), places, strict=True):
        words |= part << place
    return words


def _grid(bits: int, zeros: torch.Tensor) -> Integer | FloatZero:
    """Return the plainest grid that has these zero points."""
    if bits > 1 and bool((zeros == 1 << bits >> 1).all()):
        return Integer(bits)
    if bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << bits)).all()):
        return Integer(bits, zero=True)
    return FloatZero(bits, 16 if torch.equal(zeros.half().float(), zeros) else 32)


def _fill(bits: int, shape: tuple[int, int], group: int) -> bool:
    """Claim that the groups of a weight fill the words of HQQ, whose last word is filled up at 3 bits alone."""
    return bits == 3 or shape[0] * (shape[1] // group) % len(_PACKING[bits][2]) == 0


def _refuses(plain: PlainLayer) -> str | None:
    fmt, grid = plain.format, plain.format.grid
    if not isinstance(grid, (Integer, FloatZero)) or grid.bits not in _PACKING or fmt.layout != "dense":
        return f"{fmt.name} is not a format of HQQ, which holds integers of 1 to 6 and 8 bits, with zero points that are codes or floats"
    if fmt.block.rows != 1 or fmt.scale not in _TYPES:
        return f"{fmt.name}: HQQ has one fp16, bf16 or fp32 scale for each group of inputs of a row"
    if plain.ordered:
        return "its inputs go through a map when the model runs (permutation)"
    parts = len(_PACKING[grid.bits][2])
    group = fmt.block.resolve(plain.shape, 1)[1]
    if not _fill(grid.bits, plain.shape, group):
        return f"{fmt.name}: {plain.shape[0] * plain.shape[1] // group} groups do not fill the {parts} parts of a byte of HQQ"
    return None
