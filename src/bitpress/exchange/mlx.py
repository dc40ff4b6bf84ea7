"""MLX checkpoints, as mlx-lm writes and reads them: integers of 2, 3, 4, 5, 6 and 8 bits in groups, MXFP4 and MXFP8; tables too.

    X.weight   uint32 [out, in * bits / 32]            codes side by side, least significant bits first
    X.scales   float16, bfloat16 or float32 [out, groups]; uint8 in the modes mxfp4 and mxfp8
    X.biases   in the type of the scales, mode affine alone

    w_hat = code * scales + biases

    affine, bits B, group_size N of 32, 64, 128        intB-gN where every bias is -2^(B - 1) times its scale in 16 bits,
                                                       else intB-gN-min, min = -bias
    mxfp4, mxfp8                                       mxfp4-g32-e8m0, mxfp8-g32-e8m0

Layers of experts are one, `X = model.layers.N.mlp.switch_mlp.gate_proj`, its tensors with an axis of experts in front.

`quantization` in config.json has group_size, bits and mode of all layers, and by its name those of a layer that has others. With scales of
16 bits MLX rounds the product before it adds; the numbers here are those before any rounding.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.plain_layer import PlainLayer, make_packed, plain_layer
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.exchange.words import join_words, split_words
from bitpress.formats import Block, CompressedLayer, Format, Integer, Packed, parse_format
from bitpress.formats.layouts.dense import pack

__all__ = ["Mlx"]

_WIDTHS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_STORES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Modes beside `affine`: their bits, and our format.
_FLOATS = {"mxfp4": (4, "mxfp4-g32-e8m0"), "mxfp8": (8, "mxfp8-g32-e8m0")}
_KEYS = ("group_size", "bits", "mode")
# What mlx-lm's models name the layers of all experts in one.
_STACKS = {
    **{f"mlp.experts.{{e}}.{leaf}_proj": f"mlp.switch_mlp.{leaf}_proj" for leaf in ("gate", "up", "down")},
    **{
        f"block_sparse_moe.experts.{{e}}.{ours}": f"block_sparse_moe.switch_mlp.{theirs}"
        for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    },
}


class Mlx:
    about: ClassVar[str] = "MLX: integers of 2 to 8 bits in groups, MXFP4 and MXFP8"
    tables: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = True
    marks: ClassVar[frozenset[str]] = frozenset({"weight", "scales"})
    suffixes: ClassVar[frozenset[str]] = frozenset({"weight", "scales", "biases"})
    stacks: ClassVar[Stacks] = Stacks(_STACKS)

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        other = config.get("quantization_config")
        return isinstance(config.get("quantization"), dict) and not (isinstance(other, dict) and "quant_method" in other)

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        settings = config["quantization"]
        return {name: _entry(name, settings) for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        group, bits, _ = _checked(entry)
        words = tensors["weight"].shape if "weight" in tensors else ()
        if len(words) != 2 or words[1] * 32 % (bits * group):
            raise FormatError(f"weight is {list(words)} where words of groups of {group} codes of {bits} bits are needed.")
        return words[0], words[1] * 32 // bits

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        ordered = {name: tuple(entry[key] for key in _KEYS) for name, entry in sorted(entries.items())}
        base = Counter(ordered.values()).most_common(1)[0][0]
        own = {name: dict(zip(_KEYS, entry, strict=True)) for name, entry in ordered.items() if entry != base}
        settings = {**dict(zip(_KEYS, base, strict=True)), **own}
        return {**config, "quantization": settings, "quantization_config": settings}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        return plain if isinstance(plain, str) else _refuses(plain)

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        for width in reversed(_WIDTHS):
            for group in (64, 128, 32):
                if width <= bits and shape[1] % group == 0:
                    return f"int{width}-g{group}"
        return None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        refused = Mlx.refuses(layer.weight.spec(), layer.input_spec())
        if refused is not None:
            raise FormatError(f"{refused}.")
        term = layer.weight.terms[0]
        assert isinstance(term, Packed)
        if term.parts > 1:
            raise FormatError("it is a stack of matrices, which are stored one by one.")
        fmt, scale = term.format, term.tensors["scale"]
        bits = fmt.grid.code_bits
        stored = {"weight": join_words(term.unpack_codes(), bits).view(torch.uint32), "scales": scale}
        mode = next((mode for mode, (_, name) in _FLOATS.items() if name == fmt.name), "affine")
        if mode == "affine":
            stored["biases"] = -term.tensors["min"] if "min" in term.tensors else -scale * (1 << bits >> 1)
            if not bool(torch.isfinite(stored["biases"]).all()):
                raise FormatError(
                    f"a bias, {1 << bits >> 1} times a scale, is beyond the range of {fmt.scale}; store scales as bf16."
                )
        return StoredLayer(stored, {"group_size": fmt.block.cols, "bits": bits, "mode": mode})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        group, bits, mode = _checked(stored.entry)
        tensors = stored.tensors
        needed = Mlx.suffixes if mode == "affine" else Mlx.marks
        if tensors.keys() != needed:
            raise FormatError(f"a layer of MLX in mode {mode} has {sorted(needed)}, not {sorted(tensors)}.")
        codes = split_words(tensors["weight"], bits)
        out, width = codes.shape
        scales, grid = tensors["scales"], [out, width // group]
        if (
            width % group
            or list(scales.shape) != grid
            or (scales.dtype not in _STORES if mode == "affine" else scales.dtype != torch.uint8)
        ):
            raise FormatError(
                f"scales are {scales.dtype} {list(scales.shape)} for a weight {[out, width]} in groups of {group}."
            )
        parts = {"codes": pack(codes, bits), "scale": scales.contiguous()}
        if mode != "affine":
            return make_packed(parse_format(_FLOATS[mode][1]), (out, width), parts)
        biases = tensors["biases"]
        if biases.dtype != scales.dtype or list(biases.shape) != grid:
            raise FormatError(f"biases are {biases.dtype} {list(biases.shape)} where {scales.dtype} {grid} is needed.")
        if scales.dtype != torch.float32 and torch.equal(biases.float(), scales.float() * -(1 << bits >> 1)):
            return make_packed(Format(Integer(bits), Block(1, group), _STORES[scales.dtype]), (out, width), parts)
        fmt = parse_format(f"int{bits}-g{group}-min-{_STORES[scales.dtype]}")
        return make_packed(fmt, (out, width), {**parts, "min": -biases})


def _entry(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of a layer. Raises FormatError for settings that are not known."""
    own = settings.get(name, {})
    if not isinstance(own, dict):
        raise FormatError(f"{name}: `quantization` says {own!r} of it, and its tensors are those of a compressed layer.")
    if unknown := sorted(set(own) - set(_KEYS)):
        raise FormatError(f"{name}: unknown setting {unknown[0]!r} of MLX.")
    entry = {"mode": "affine", **{key: settings[key] for key in _KEYS if key in settings}, **own}
    try:
        group, bits, mode = _checked(entry)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    return {"group_size": group, "bits": bits, "mode": mode}


def _checked(entry: Mapping[str, Any]) -> tuple[int, int, str]:
    if set(entry) != set(_KEYS):
        raise FormatError(f"a layer of MLX is described by {sorted(_KEYS)}, not {sorted(entry)}.")
    group, bits, mode = (entry[key] for key in _KEYS)
    if not isinstance(mode, str) or type(group) is not int or type(bits) is not int:
        raise FormatError(f"mode {mode!r}, group_size {group!r}, bits {bits!r} of MLX.")
    if mode in _FLOATS:
        known = group == 32 and bits == _FLOATS[mode][0]
    else:
        known = mode == "affine" and group in _GROUPS and bits in _WIDTHS
    if not known:
        raise FormatError(
            f"mode {mode!r} of MLX with groups of {group}, {bits} bits; affine, mxfp4 and mxfp8 are read as MLX has them."
        )
    return group, bits, mode


def _refuses(plain: PlainLayer) -> str | None:
    fmt = plain.format
    if plain.ordered:
        return "its inputs go through a map when the model runs (permutation)"
    if fmt.name in {name for _, name in _FLOATS.values()}:
        return None
    minimum = [param.name for param in fmt.grid.params] == ["scale", "min"]
    if not minimum and not (isinstance(fmt.grid, Integer) and not fmt.grid.zero):
        return f"{fmt.name} is not a format of MLX, which has integers without zero points or with a minimum, mxfp4 and mxfp8"
    if not minimum and fmt.scale == "fp32":
        return f"{fmt.name}: MLX adds a bias to the product, which float32 rounds; store scales as fp16 or bf16"
    if fmt.grid.code_bits not in _WIDTHS or fmt.block.rows != 1 or fmt.block.cols not in _GROUPS:
        return f"{fmt.name}: MLX has 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128"
    return (
        None
        if fmt.scale in _STORES.values() and fmt.layout == "dense"
        else f"{fmt.name}: MLX has plain scales fp16, bf16 or fp32"
    )
