"""AWQ checkpoints: integers of 4 bits with zero points, in the order `gemm`, as AutoAWQ, llm-awq's users, vLLM and transformers read them.

    X.qweight   int32 [in, out / 8]        codes of eight outputs in a word, from the lowest bits on outputs 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros    int32 [groups, out / 8]    zero points in the same order
    X.scales    float16 or bfloat16 [groups, out]

    w_hat[o, i] = (code[o, i] - zero[i // group, o]) * scales[i // group, o]

    int4-gN-zero, int4-row-zero         version gemm, bits 4, group_size N or -1
    int4-gN, int4-row                   the same, all zero points 8

One group size serves a checkpoint. Versions `gemv`, `gemv_fast` and others are refused by name: their words have another order.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.expert_names import Stacks, experts_of
from bitpress.exchange.plain_layer import PlainLayer, make_plain, plain_layer, unpack_plain
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.exchange.words import join_words, split_words
from bitpress.formats import Block, CompressedLayer, Format, Integer

__all__ = ["Awq"]

# The output of each of the eight codes of a word, from its lowest bits on, and the place of each of eight outputs.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(output) for output in range(8))
_STORES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_SYMMETRIC = 8


class Awq:
    about: ClassVar[str] = "AWQ's integers of 4 bits with zero points, in groups of inputs"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = True
    marks: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})
    suffixes: ClassVar[frozenset[str]] = marks
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == "awq"

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        settings = config["quantization_config"]
        version = settings.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise FormatError(f"quantization_config: version {version!r} of AWQ; gemm is read.")
        bits = settings.get("bits", settings.get("w_bit", 4))
        if type(bits) is not int or bits != 4 or settings.get("zero_point", True) is not True:
            raise FormatError(
                f"bits {bits!r}, zero_point {settings.get('zero_point')!r} of AWQ; 4 bits with zero points are read."
            )
        entry = {"group_size": settings.get("group_size", settings.get("q_group_size", 128))}
        return dict.fromkeys(layers, entry)

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        words = tensors["qweight"].shape if "qweight" in tensors else ()
        if len(words) != 2:
            raise FormatError(f"qweight is {list(words)} where a matrix of words is needed.")
        return words[1] * 8, words[0]

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        sizes = sorted({entry["group_size"] for entry in entries.values()})
        if len(sizes) > 1:
            raise FormatError(
                f"weights have groups of {', '.join(map(str, sizes))}; a checkpoint of AWQ has one size of groups."
            )
        settings = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": sizes[0], "zero_point": True}
        quantized = {found[0] for name in entries if (found := experts_of(name)) is not None}
        folded = {name if (found := experts_of(name)) is None or found[0] in quantized else found[0] for name in plain}
        kept = sorted(name for name in folded if any(part.isdigit() for part in name.split(".")))
        return {**config, "quantization_config": settings | {"modules_to_not_convert": kept or None}}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        return plain if isinstance(plain, str) else _refuses(plain)

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        fits = [f"int4-g{group}-zero" for group in (128, 64, 32) if shape[1] % group == 0]
        return fits[0] if fits and shape[0] % 8 == 0 and bits >= 4 else None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        plain, codes, params, _ = unpack_plain(layer)
        refused = _refuses(plain)
        if refused is not None:
            raise FormatError(f"{refused}.")
        grid, block = plain.format.grid, plain.format.block
        assert isinstance(grid, Integer)
        scale = params["scale"]
        zero = params["zero"].to(torch.uint8) if grid.zero else torch.full(scale.shape, _SYMMETRIC, dtype=torch.uint8)
        dtype = torch.float16 if plain.format.scale == "fp16" else torch.bfloat16
        tensors = {
            "qweight": join_words(_shuffled(codes.T, _ORDER), 4),
            "qzeros": join_words(_shuffled(zero.T, _ORDER), 4),
            "scales": scale.T.to(dtype).contiguous(),
        }
        return StoredLayer(tensors, {"group_size": -1 if block.cols == "all" else block.cols})

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        entry, tensors = stored.entry, stored.tensors
        if set(entry) != {"group_size"}:
            raise FormatError(f"a layer of AWQ is described by its group_size, not by {sorted(entry)}.")
        if tensors.keys() != Awq.marks:
            raise FormatError(f"a layer of AWQ has {sorted(Awq.marks)}, not {sorted(tensors)}.")
        codes = _shuffled(split_words(tensors["qweight"], 4), _PLACES).T
        zeros = _shuffled(split_words(tensors["qzeros"], 4), _PLACES).T
        out, width = codes.shape
        group = width if entry["group_size"] in (-1, None) else entry["group_size"]
        if type(group) is not int or group < 1 or width % group:
            raise FormatError(f"group_size {group!r} does not divide the {width} inputs.")
        scales, needed = tensors["scales"], [width // group, out]
        if list(scales.shape) != needed or list(zeros.shape) != needed[::-1] or scales.dtype not in _STORES:
            raise FormatError(
                f"scales are {scales.dtype} {list(scales.shape)}, zero points {list(zeros.T.shape)}; {needed} are needed."
            )
        symmetric = bool((zeros == _SYMMETRIC).all())
        block = Block(1, "all" if entry["group_size"] in (-1, None) else group)
        params = {"scale": scales.T.float().contiguous()} | ({} if symmetric else {"zero": zeros.float()})
        return make_plain(Format(Integer(4, zero=not symmetric), block, _STORES[scales.dtype]), codes.contiguous(), params)


def _shuffled(rows: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """Return every eight columns in another order."""
    return rows.reshape(len(rows), -1, 8)[..., list(places)].flatten(1)


def _refuses(plain: PlainLayer) -> str | None:
    fmt = plain.format
    if not isinstance(fmt.grid, Integer) or fmt.grid.bits != 4 or fmt.layout != "dense":
        return f"{fmt.name} is not a format of AWQ, which holds int4 in groups of inputs"
    if fmt.block.rows != 1 or fmt.scale not in ("fp16", "bf16"):
        return f"{fmt.name}: AWQ has one fp16 or bf16 scale for each group of inputs of a row"
    if plain.ordered:
        return "its inputs go through a map when the model runs (permutation)"
    return f"{plain.shape[0]} outputs are not a multiple of 8, as many as a word of AWQ holds" if plain.shape[0] % 8 else None
