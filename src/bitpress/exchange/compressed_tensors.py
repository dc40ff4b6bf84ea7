"""compressed-tensors checkpoints, as llm-compressor writes them and vLLM, SGLang and transformers read them.

    format                 tensors of a layer X                                     our format
    pack-quantized         X.weight_packed int32, X.weight_shape int64 [2]          intN-{gN, row, tensor}[-zero]
    int-quantized          X.weight int8                                            the same, where inputs are rounded
    float-quantized        X.weight float8_e4m3fn                                   e4m3-{gN, row, tensor, RxC}
    mxfp8-quantized        X.weight float8_e4m3fn, X.weight_scale uint8             mxfp8-g32-e8m0
    mxfp6-pack-quantized   X.weight_packed uint8, X.weight_scale uint8              mxfp6-g32-e8m0
    mxfp4-pack-quantized   X.weight_packed uint8, X.weight_scale uint8              mxfp4-g32-e8m0
    nvfp4-pack-quantized   X.weight_packed uint8, X.weight_scale float8_e4m3fn,
                           X.weight_global_scale float32 [1], which divides         e2m1-g16-fp8over

    X.weight_scale         float16, bfloat16 or float32 where nothing else is said: [out, groups], [out, 1], [1] or one for each block
    X.weight_zero_point    int8 in the shape of the scales; in pack-quantized packed down the rows
    X.weight_g_idx         int32 [in]: the group of every input (`actorder: group`, which version 0.20 no longer reads)
    X.input_scale          [1], and X.input_zero_point int8 [1]: the parameters of a static input
    X.input_global_scale   float32 [1], which divides the scales that NVFP4 fits to every 16 channels of a token (`dynamic: local`)

    w_hat = (code - zero) * scale        integers are signed there: theirs plus 2^(bits - 1) is our code, and our zero point

Packed codes lie side by side. Before version 0.18 none of them went over the end of a word, which differs for 3, 5, 6 and 7 bits; such
files are read. Blocks that do not divide a weight are read in smaller ones with equal scales. How a dynamic scale is chosen is the
runtime's; its format is kept (`int8-row-fp32 dynamic`).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.compressed_tensors_input import (
    from_unsigned,
    needed,
    one_value,
    read_input,
    to_unsigned,
    written_input,
)
from bitpress.exchange.compressed_tensors_scheme import INT, NVFP4, STORES, Args, Scheme, read_schemes, write_settings
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.plain_layer import make_packed, order_of_groups, plain_layer
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.exchange.words import join_words, split_apart, split_words, words_of
from bitpress.formats import Block, CompressedLayer, Format, Integer, Packed, Params, parse_format
from bitpress.formats.layouts.dense import pack, unpack
from bitpress.formats.maps.map import Permutation

__all__ = ["CompressedTensors"]

# Floats by the format of a file: bits, our format, and the names of the tensors of codes and of the scale of the tensor.
_FLOATS: dict[str, tuple[int, str]] = {
    "mxfp8-quantized": (8, "mxfp8-g32-e8m0"),
    "mxfp6-pack-quantized": (6, "mxfp6-g32-e8m0"),
    "mxfp4-pack-quantized": (4, "mxfp4-g32-e8m0"),
    "nvfp4-pack-quantized": (4, NVFP4),
}
_NAMED = {name: file for file, (_, name) in _FLOATS.items()}
_NVFP4 = "nvfp4-pack-quantized"


class CompressedTensors:
    about: ClassVar[str] = "compressed-tensors, as vLLM reads it: integers of 2 to 8 bits, FP8, MXFP8, MXFP6, MXFP4, NVFP4"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = True
    marks: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"}
        | {"input_scale", "input_zero_point", "input_global_scale"}
    )
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == "compressed-tensors"

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        return {name: scheme.to_json() for name, scheme in read_schemes(config["quantization_config"], layers).items()}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        scheme = Scheme.from_json(entry)
        if scheme.format == "pack-quantized":
            needed(tensors, "weight_packed", "weight_shape")
            if math.prod(tensors["weight_shape"].shape) != 2:
                raise FormatError(f"weight_shape has the shape {list(tensors['weight_shape'].shape)} where [2] is needed.")
            return _packed_shape(read("weight_shape"))
        name = "weight_packed" if "pack" in scheme.format else "weight"
        needed(tensors, name)
        shape = tensors[name].shape
        if len(shape) != 2:
            raise FormatError(f"{name} is {list(shape)} where a matrix is needed.")
        return shape[0], shape[1] * 8 // scheme.weights.num_bits if "pack" in scheme.format else shape[1]

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        schemes = {name: Scheme.from_json(entry) for name, entry in sorted(entries.items())}
        return {**config, "quantization_config": write_settings(schemes, plain)}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, None)
        if isinstance(plain, str):
            return plain
        scheme = _scheme(plain.format, plain.shape, plain.ordered, input_spec)
        return scheme if isinstance(scheme, str) else None

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        for width in (8, 4, 3, 2):
            for group in (128, 64, 32):
                if width <= bits and shape[1] % group == 0:
                    return f"int{width}-g{group}"
        return "int8-row" if bits >= 8 else None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        refused = CompressedTensors.refuses(layer.weight.spec(), layer.input_spec())
        if refused is not None:
            raise FormatError(f"{refused}.")
        term, change = layer.weight.terms[0], layer.weight.input_map
        assert isinstance(term, Packed)
        if term.parts > 1:
            raise FormatError("it is a stack of matrices, which are stored one by one.")
        scheme = _scheme(term.format, term.shape, change is not None, layer.input_spec())
        assert isinstance(scheme, Scheme)
        codes, params = term.unpack()
        stored: dict[str, torch.Tensor] = {}
        if isinstance(change, Permutation):
            back = torch.argsort(change.order.long())
            width = term.format.block.resolve(term.shape, 1)[1]
            codes, stored["weight_g_idx"] = codes[:, back], (torch.arange(term.shape[1]) // width)[back].to(torch.int32)
        stored |= _written_codes(scheme, codes)
        stored |= _written_params(scheme, term, params)
        return StoredLayer(stored | written_input(layer.input), scheme.to_json())

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        scheme, tensors = Scheme.from_json(stored.entry), stored.tensors
        if not tensors.keys() <= CompressedTensors.suffixes:
            raise FormatError(f"a layer of compressed-tensors has {sorted(CompressedTensors.suffixes)}, not {sorted(tensors)}.")
        needed(tensors, "weight_scale")
        codes = _read_codes(scheme, tensors)
        fmt, parts = _read_params(scheme, tensors, (codes.shape[0], codes.shape[1]))
        order, groups = None, tensors.get("weight_g_idx")
        if groups is not None and not bool((groups == -1).all()):
            if scheme.weights.strategy != "group":
                raise FormatError("weight_g_idx says groups of inputs, and the scales are not those of groups.")
            order = order_of_groups(groups, codes.shape[1], fmt.block.resolve((codes.shape[0], codes.shape[1]), 1)[1])
        codes = codes if order is None else codes[:, order].contiguous()
        parts["codes"] = pack(codes, fmt.grid.code_bits)
        return make_packed(fmt, (codes.shape[0], codes.shape[1]), parts, order, read_input(scheme.inputs, tensors))


def _packed_shape(stored: torch.Tensor) -> tuple[int, int]:
    if stored.numel() != 2 or stored.dtype not in (torch.int64, torch.int32):
        raise FormatError(f"weight_shape is {stored.dtype} {list(stored.shape)} where two whole numbers are needed.")
    rows, columns = (int(size) for size in stored.flatten())
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        raise FormatError(f"weight_shape is {[rows, columns]}.")
    return rows, columns


# -------------------------------------------------------------------------------------------------------------------------- the weight


def _scheme(fmt: Format, shape: tuple[int, int], ordered: bool, input_spec: Mapping[str, str] | None) -> Scheme | str:
    """Return how a layer of these is told, or why it cannot be."""
    if input_spec is not None and (more := sorted(set(input_spec) - {"format", "parameters"})):
        return f"channels of its input are not rounded alike ({', '.join(more)}), which compressed-tensors cannot say"
    inputs = None if input_spec is None else Args.of_input(input_spec["format"], input_spec["parameters"])
    if isinstance(inputs, str):
        return inputs
    if fmt.layout != "dense":
        return f"{fmt.name}: compressed-tensors has no layout {fmt.layout}"
    if ordered and fmt.block.rows != 1:
        return f"{fmt.name}: compressed-tensors has an order of inputs for groups of inputs alone"
    if fmt.name in _NAMED:
        file = _NAMED[fmt.name]
        strategy = "tensor_group" if file == _NVFP4 else "group"
        dtype = "torch.float8_e4m3fn" if file == _NVFP4 else "torch.uint8"
        weights = Args(_FLOATS[file][0], "float", True, strategy, fmt.block.resolve(shape, 1)[1], scale_dtype=dtype)
        return f"{fmt.name}: compressed-tensors has no order of its inputs" if ordered else Scheme(file, weights, inputs)
    grid = fmt.grid
    if not (isinstance(grid, Integer) or grid.name == "e4m3") or fmt.scale not in STORES.values():
        near = "; e2m1-g16-fp8over is NVFP4 as compressed-tensors has it" if fmt.name == "e2m1-g16-fp8" else ""
        return f"{fmt.name} is not a format of compressed-tensors{near}"
    group, block = fmt.block.cols if fmt.block.rows == 1 and fmt.block.cols != "all" else None, None
    strategy = {"row": "channel", "tensor": "tensor"}.get(fmt.block.name, "group" if group is not None else "block")
    if strategy == "block":
        if isinstance(grid, Integer):
            return f"{fmt.name}: compressed-tensors packs integers in groups of inputs, rows or whole weights"
        block = fmt.block.resolve(shape, 1)
    ordering = "group" if ordered else None
    if ordered and group is None:
        return f"{fmt.name}: compressed-tensors has an order of inputs for groups of inputs alone"
    zero = isinstance(grid, Integer) and grid.zero
    kind = "int" if isinstance(grid, Integer) else "float"
    weights = Args(grid.code_bits, kind, not zero, strategy, group, block, actorder=ordering)
    file = "float-quantized" if kind == "float" else "pack-quantized" if inputs is None else "int-quantized"
    return Scheme(file, weights, inputs)


def _read_codes(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return codes `[out, in]` as ours."""
    bits = scheme.weights.num_bits
    if {"weight", "weight_packed"} <= tensors.keys():
        raise FormatError("its weight is stored twice, as weight and as weight_packed.")
    if scheme.format == "pack-quantized":
        needed(tensors, "weight_packed", "weight_shape")
        shape = _packed_shape(tensors["weight_shape"])
        codes = _split(tensors["weight_packed"], bits, shape[1], scheme.padded, down=False)
        if codes.shape != shape:
            raise FormatError(f"weight_packed holds {len(codes)} rows where weight_shape says {shape[0]}.")
        return codes
    if "pack" in scheme.format:
        needed(tensors, "weight_packed")
        octets = tensors["weight_packed"]
        if octets.ndim != 2 or octets.dtype != torch.uint8 or octets.shape[1] * 8 % bits:
            raise FormatError(
                f"weight_packed is {octets.dtype} {list(octets.shape)} where bytes of codes of {bits} bits are needed."
            )
        return unpack(octets.contiguous(), bits, octets.shape[1] * 8 // bits)
    needed(tensors, "weight")
    weight, dtype = tensors["weight"], torch.int8 if scheme.weights.type == "int" else torch.float8_e4m3fn
    if weight.ndim != 2 or weight.dtype != dtype:
        raise FormatError(f"weight is {weight.dtype} {list(weight.shape)} where a matrix of {dtype} is needed.")
    if scheme.weights.type == "float":
        return weight.contiguous().view(torch.uint8)
    return to_unsigned(weight, bits, "weight")


def _written_codes(scheme: Scheme, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    bits = scheme.weights.num_bits
    if scheme.format == "pack-quantized":
        return {"weight_packed": join_words(codes, bits, fill=True), "weight_shape": torch.tensor(codes.shape)}
    if "pack" in scheme.format:
        return {"weight_packed": pack(codes, bits)}
    if scheme.weights.type == "float":
        return {"weight": codes.contiguous().view(torch.float8_e4m3fn)}
    return {"weight": from_unsigned(codes, bits)}


def _read_params(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> tuple[Format, dict[str, torch.Tensor]]:
    """Return our format of a weight, and the tensors of its parameters."""
    weights, scale = scheme.weights, tensors["weight_scale"]
    if scheme.format in _FLOATS:
        fmt = parse_format(_FLOATS[scheme.format][1])
        wanted = torch.float8_e4m3fn if scheme.format == _NVFP4 else torch.uint8
        if weights.group_size != fmt.block.cols or scale.dtype != wanted or tuple(scale.shape) != fmt.block_grid(shape):
            raise FormatError(
                f"groups of {weights.group_size} with scales {scale.dtype} {list(scale.shape)}; {scheme.format} has groups of "
                f"{fmt.block.cols} with scales {wanted} {list(fmt.block_grid(shape))}."
            )
        _refuse_zeros(tensors)
        parts = {"scale": scale.contiguous().view(torch.uint8)}
        if scheme.format == _NVFP4:
            needed(tensors, "weight_global_scale")
            parts["scale_tensor"] = one_value(tensors["weight_global_scale"], "weight_global_scale", torch.float32)
        return fmt, parts
    if scale.dtype not in STORES:
        raise FormatError(f"weight_scale is {scale.dtype}; float16, bfloat16 and float32 are read.")
    block, scale = _block(weights, scale, shape)
    grid = Integer(weights.num_bits, not weights.symmetric) if weights.type == INT else parse_format("e4m3-row").grid
    fmt = Format(grid, block, STORES[scale.dtype])
    down, across = fmt.block_grid(shape)
    scale = _as_grid(scale, down, across, "weight_scale")
    if weights.symmetric:
        _refuse_zeros(tensors)
        return fmt, {"scale": scale}
    zero = _read_zero(scheme, tensors, shape, (down, across))
    return fmt, {"scale": scale, "zero": pack(zero, weights.num_bits)}


def _read_zero(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:
    """Return zero points `[down, across]` in units of our codes."""
    needed(tensors, "weight_zero_point")
    stored, bits = tensors["weight_zero_point"], scheme.weights.num_bits
    if scheme.weights.type != INT:
        raise FormatError("zero points of floats are not read.")
    if scheme.format == "pack-quantized" and scheme.weights.strategy != "tensor":
        zero = _split(stored, bits, shape[0], scheme.padded, down=True)
        if tuple(zero.shape) != grid:
            raise FormatError(f"weight_zero_point holds {list(zero.shape)} zero points where {list(grid)} are needed.")
        return zero
    if stored.dtype != torch.int8:
        raise FormatError(f"weight_zero_point is {stored.dtype} where int8 is needed.")
    return _as_grid(to_unsigned(stored, bits, "weight_zero_point"), *grid, "weight_zero_point")


def _written_params(scheme: Scheme, term: Packed, params: Params) -> dict[str, torch.Tensor]:
    scale, bits = term.tensors["scale"], scheme.weights.num_bits
    if scheme.format == _NVFP4:
        return {"weight_scale": scale.view(torch.float8_e4m3fn), "weight_global_scale": term.tensors["scale_tensor"]}
    whole = scheme.weights.strategy == "tensor"
    stored = {"weight_scale": scale.reshape(1) if whole else scale}
    if not scheme.weights.symmetric:
        zero = params["zero"].to(torch.uint8)
        if scheme.format == "pack-quantized" and not whole:
            stored["weight_zero_point"] = join_words(zero, bits, down=True, fill=True)
        else:
            stored["weight_zero_point"] = from_unsigned(zero, bits).reshape(-1) if whole else from_unsigned(zero, bits)
    return stored


def _block(weights: Args, scale: torch.Tensor, shape: tuple[int, int]) -> tuple[Block, torch.Tensor]:
    """Return the block of a weight and its scales; for blocks that do not divide it, smaller ones of equal scales."""
    if weights.strategy in ("tensor", "channel"):
        return Block("all" if weights.strategy == "tensor" else 1, "all"), scale
    if weights.strategy == "group":
        assert weights.group_size is not None
        return Block(1, weights.group_size), scale
    if weights.strategy != "block" or weights.block_structure is None:
        raise FormatError(
            f"strategy {weights.strategy!r} of a weight; these are read: tensor, channel, group, block, tensor_group."
        )
    rows, columns = weights.block_structure
    if tuple(scale.shape) != (-(-shape[0] // rows), -(-shape[1] // columns)):
        raise FormatError(f"weight_scale is {list(scale.shape)} for a weight {list(shape)} in blocks of {rows}x{columns}.")
    down, across = math.gcd(rows, shape[0]), math.gcd(columns, shape[1])
    if shape[0] % rows or shape[1] % columns:
        scale = scale[torch.arange(0, shape[0], down) // rows][:, torch.arange(0, shape[1], across) // columns]
        return Block(down, across), scale
    return Block(rows, columns), scale


def _split(words: torch.Tensor, bits: int, count: int, padded: bool, *, down: bool) -> torch.Tensor:
    """Return codes by the layout whose number of words this is; by the version where both have the same."""
    held = words.shape[0 if down else 1] if words.ndim == 2 else -1
    apart, beside = held == -(-count // (32 // bits)), held == words_of(count, bits)
    if 32 % bits and apart and (padded or not beside):
        return split_apart(words, bits, count, down=down)
    return split_words(words, bits, count=count, down=down)


def _as_grid(values: torch.Tensor, down: int, across: int, name: str) -> torch.Tensor:
    """Return one value a block as `[down, across]`; those of rows or of the whole weight may lack an axis."""
    shapes = [(down, across)] + [(down,)] * (across == 1) + [()] * (down == across == 1)
    if tuple(values.shape) not in shapes:
        raise FormatError(f"{name} is {list(values.shape)} where {[down, across]} is needed.")
    return values.reshape(down, across).contiguous()


def _refuse_zeros(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise FormatError for zero points other than 0 in what says that it has none."""
    zero = tensors.get("weight_zero_point")
    if zero is not None and bool((zero.float() != 0).any()):
        raise FormatError("the weight is symmetric, and has a weight_zero_point that is not 0.")
