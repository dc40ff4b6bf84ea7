"""bitsandbytes checkpoints of LLM.int8(), read alone: bytes and a scale for every row.

    X.weight         int8 [out, in]
    X.SCB            float32 [out]         the largest magnitude of a row
    X.weight_format  uint8 0: rows

    w_hat = weight * SCB / 127             int8-row-fp32, its scale SCB / 127

bitsandbytes multiplies by SCB and then by 1 / 127; one rounded scale gives numbers up to 2^-22 of them away, which is why such files are not
written. When a model runs there, its inputs are rounded too, but for outliers among them; here they are not.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.plain_layer import make_packed
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.formats import CompressedLayer, parse_format

__all__ = ["BitsandbytesInt8"]


class BitsandbytesInt8:
    about: ClassVar[str] = "bitsandbytes' LLM.int8(), read alone"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset({"weight", "SCB"})
    suffixes: ClassVar[frozenset[str]] = frozenset({"weight", "SCB", "weight_format"})
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return (
            isinstance(settings, dict)
            and settings.get("quant_method") == "bitsandbytes"
            and settings.get("load_in_8bit") is True
        )

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        return {name: {} for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        shape = tensors["weight"].shape if "weight" in tensors else ()
        if len(shape) != 2:
            raise FormatError(f"weight is {list(shape)} where a matrix is needed.")
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
        tensors = stored.tensors
        if stored.entry or not BitsandbytesInt8.marks <= tensors.keys() <= BitsandbytesInt8.suffixes:
            raise FormatError(f"a layer of LLM.int8() has {sorted(BitsandbytesInt8.suffixes)}, not {sorted(tensors)}.")
        weight, largest = tensors["weight"], tensors["SCB"]
        if (
            weight.ndim != 2
            or weight.dtype != torch.int8
            or largest.dtype != torch.float32
            or largest.shape != weight.shape[:1]
        ):
            raise FormatError(f"weight is {weight.dtype} {list(weight.shape)} and SCB {largest.dtype} {list(largest.shape)}.")
        order = tensors.get("weight_format")
        if order is not None and (order.numel() != 1 or int(order) != 0):
            raise FormatError(
                "weight_format is not 0: codes in tiles; older versions of bitsandbytes wrote them, load and save it there."
            )
        codes = (weight.to(torch.int16) + 128).to(torch.uint8)
        tensors = {"codes": codes, "scale": (largest / 127).unsqueeze(1)}
        return make_packed(parse_format("int8-row-fp32"), (weight.shape[0], weight.shape[1]), tensors)


_WHY = "files of LLM.int8() are read and not written: their scales are 127 times ours, which float32 does not hold exactly"
