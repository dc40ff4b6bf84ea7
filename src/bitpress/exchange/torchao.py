"""torchao checkpoints as transformers saves them, read alone. The header of the safetensors file says what a tensor means:

    __metadata__     X.weight: {"_type": a class, "_data": its attributes, "_tensor_data_names": [...]}, as JSON

    class of torchao              tensors                                          what is read
    IntxUnpackedToInt8Tensor      qdata int8 [out, in] from -2^(bits-1) up,        intB-BLOCK, -zero where a zero point is not 0
                                  scale, zero_point [out / rows, in / columns]
    Int8Tensor                    the same in 8 bits; zero_point may be left out   int8-BLOCK
    Float8Tensor                  qdata float8_e4m3fn, scale                       e4m3-BLOCK

    X._weight_qdata, X._weight_scale, X._weight_zero_point     names of the tensors
    w_hat = (qdata - zero_point) * scale

torchao rounds that product to the type of the model (`dtype`), and here it stays in float32. Classes in the layout of one kernel are refused
by name, and so is Int4Tensor, which adds its zero points in float to values; inputs that are rounded when the model runs are refused as well:
torchao chooses their scales in its own way.
(torchao/prototype/safetensors/safetensors_support.py, torchao/quantization/quantize_/workflows)
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.compressed_tensors_input import to_unsigned
from bitpress.exchange.compressed_tensors_scheme import STORES
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.plain_layer import make_packed
from bitpress.exchange.source import HEADERS, ReadTensor, StoredLayer
from bitpress.formats import CompressedLayer, Format, Integer, parse_format
from bitpress.formats.block import Block
from bitpress.formats.layouts.dense import pack

__all__ = ["Torchao"]

_QDATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
# By the class: the attributes that say how inputs are rounded, each null in a weight that is read.
_CLASSES: dict[str, tuple[str, ...]] = {
    "IntxUnpackedToInt8Tensor": ("activation_quantization",),
    "Int8Tensor": ("act_quant_kwargs",),
    "Float8Tensor": ("act_quant_kwargs",),
}
_BITS = {f"int{bits}": bits for bits in range(1, 9)}
_WHY = "torchao's files are read and not written"


class Torchao:
    about: ClassVar[str] = "torchao's integers and float8 of weights alone, in safetensors, read alone"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset({_QDATA})
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {_QDATA, _SCALE, _ZERO, *(f"_weight_act_{leaf}" for leaf in ("quant_scale", "quant_zero_point", "pre_scale"))}
    )
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == "torchao"

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        said = config[HEADERS]
        if not layers:
            raise FormatError(f"no file has a tensor {_QDATA}; torchao's other ways to save a model are not read.")
        return {name: _entry(name, said.get(f"{name}.weight")) for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        shape = tensors[_QDATA].shape if _QDATA in tensors else ()
        if len(shape) != 2:
            raise FormatError(f"{_QDATA} is {list(shape)} where a matrix is needed.")
        return shape[0], shape[1]

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        raise FormatError(f"{_WHY}.")

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        return _WHY

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        return None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        raise FormatError(f"{_WHY}.")

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        entry, tensors = stored.entry, stored.tensors
        if set(entry) != {"class", "block", "bits"}:
            raise FormatError(f"a layer of torchao is described by its class, block and bits, not by {sorted(entry)}.")
        if not {_QDATA, _SCALE} <= tensors.keys() <= {_QDATA, _SCALE, _ZERO}:
            raise FormatError(f"a weight of torchao has {_QDATA}, {_SCALE} and {_ZERO}, not {sorted(tensors)}.")
        qdata, scale, zero = tensors[_QDATA], tensors[_SCALE], tensors.get(_ZERO)
        floats = entry["class"] == "Float8Tensor"
        wanted = torch.float8_e4m3fn if floats else torch.int8
        if qdata.ndim != 2 or qdata.dtype != wanted:
            raise FormatError(f"{_QDATA} is {qdata.dtype} {list(qdata.shape)} where a matrix of {wanted} is needed.")
        if scale.dtype not in STORES:
            raise FormatError(f"{_SCALE} is {scale.dtype}; float16, bfloat16 and float32 are read.")
        shape, bits = (qdata.shape[0], qdata.shape[1]), entry["bits"]
        block = _block(entry["block"], shape)
        if zero is not None and (floats or zero.dtype != torch.int8):
            raise FormatError(f"{_ZERO} is {zero.dtype}; zero points are int8, and those of integers.")
        zeros = zero is not None and (bits == 1 or bool((zero != 0).any()))
        grid = parse_format("e4m3-row").grid if floats else Integer(bits, zeros)
        fmt = Format(grid, block, STORES[scale.dtype])
        blocks = fmt.block_grid(shape)
        parts = {"scale": _as_grid(scale, blocks, _SCALE)}
        codes = qdata.contiguous().view(torch.uint8) if floats else to_unsigned(qdata, bits, _QDATA)
        parts["codes"] = pack(codes, fmt.grid.code_bits)
        if zeros:
            assert zero is not None
            parts["zero"] = pack(to_unsigned(_as_grid(zero, blocks, _ZERO), bits, _ZERO), bits)
        elif zero is not None:
            _as_grid(zero, blocks, _ZERO)
        return make_packed(fmt, shape, parts)


def _entry(layer: str, text: str | None) -> dict[str, Any]:
    """Return what the header says of a weight. Raises FormatError for a class or a setting that is not read, by name."""
    try:
        told = json.loads(text) if text is not None else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{layer}: what the header says of its weight is no JSON.") from error
    if not isinstance(told, dict) or not isinstance(told.get("_data"), dict):
        raise FormatError(f"{layer}: the header of the safetensors file does not say what its weight is.")
    kind, data = told.get("_type"), told["_data"]
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise FormatError(f"{layer}: is of torchao's class {str(kind)[:60]!r}; {', '.join(_CLASSES)} are read.")
    for setting in _CLASSES[kind]:
        if data.get(setting) is not None:
            raise FormatError(f"{layer}: its inputs are rounded when the model runs ({setting}), as torchao alone does it.")
    if data.get("reduce_range") not in (None, False, True):
        raise FormatError(f"{layer}: reduce_range is {str(data['reduce_range'])[:40]!r}.")
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise FormatError(f"{layer}: block_size is {str(block)[:60]}, where rows and columns are needed.")
    return {"class": kind, "block": block, "bits": _bits(layer, data) if kind == "IntxUnpackedToInt8Tensor" else 8}


def _bits(layer: str, data: Mapping[str, Any]) -> int:
    told = data.get("target_dtype")
    name = told.get("_data") if isinstance(told, dict) and told.get("_type") == "torch.dtype" else None
    if not isinstance(name, str) or name not in _BITS:
        raise FormatError(f"{layer}: target_dtype is {str(told)[:60]}, where int1 to int8 is needed.")
    return _BITS[name]


def _block(sizes: list[int], shape: tuple[int, int]) -> Block:
    rows, columns = sizes
    if shape[0] % rows or shape[1] % columns:
        raise FormatError(f"blocks of {rows}x{columns} do not divide a weight {list(shape)}.")
    if (rows, columns) == shape:
        return Block("all", "all")
    return Block(rows, "all" if columns == shape[1] and rows == 1 else columns)


def _as_grid(values: torch.Tensor, blocks: tuple[int, int], name: str) -> torch.Tensor:
    if tuple(values.shape) != blocks:
        raise FormatError(f"{name} is {list(values.shape)} where {list(blocks)} is needed.")
    return values.contiguous()
