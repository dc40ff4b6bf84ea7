"""How a compressed-tensors checkpoint stores a rounded input, and checks of single tensors that weights share."""

from collections.abc import Mapping
from typing import Any

import torch

from bitpress.errors import FormatError
from bitpress.exchange.compressed_tensors_scheme import STORES, Args
from bitpress.formats import ActivationFormat, ChannelFormat, InputFormat, parse_format
from bitpress.formats.layouts.dense import pack, row_bytes, unpack

__all__ = ["from_unsigned", "needed", "one_value", "read_input", "to_unsigned", "written_input"]


def read_input(args: Args | None, tensors: Mapping[str, torch.Tensor]) -> ActivationFormat | None:
    """Return how inputs are rounded. Raises FormatError for a way that our formats do not say."""
    if args is None:
        return None
    if args.dynamic == "local":
        needed(tensors, "input_global_scale")
        parts = {"scale_tensor": one_value(tensors["input_global_scale"], "input_global_scale", torch.float32)}
        made = ActivationFormat(parse_format(args.input_name()), "local", parts)
        made.check()
        return made
    if args.dynamic:
        return ActivationFormat(parse_format(args.input_name()))
    needed(tensors, "input_scale")
    scale = one_value(tensors["input_scale"], "input_scale", *STORES)
    parts = {"scale": scale.reshape(1, 1)}
    if not args.symmetric:
        needed(tensors, "input_zero_point")
        zero = to_unsigned(
            one_value(tensors["input_zero_point"], "input_zero_point", torch.int8), args.num_bits, "input_zero_point"
        )
        parts["zero"] = pack(zero.reshape(1, 1), args.num_bits)
    made = ActivationFormat(parse_format(args.input_name(STORES[scale.dtype])), "static", parts)
    made.check()
    return made


def written_input(input: InputFormat | None) -> dict[str, torch.Tensor]:
    assert not isinstance(input, ChannelFormat)
    if input is None or input.parameters == "dynamic":
        return {}
    if input.parameters == "local":
        return {"input_global_scale": input.tensors["scale_tensor"].reshape(1)}
    stored = {"input_scale": input.tensors["scale"].reshape(1)}
    if "zero" in input.tensors:
        bits = input.format.grid.code_bits
        assert input.tensors["zero"].shape == (1, row_bytes(1, bits))
        stored["input_zero_point"] = from_unsigned(unpack(input.tensors["zero"], bits, 1), bits).reshape(1)
    return stored


def needed(tensors: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FormatError(f"the layer has no {missing[0]}; it has {', '.join(sorted(tensors)) or 'nothing'}.")


def one_value(value: torch.Tensor, name: str, *dtypes: torch.dtype) -> torch.Tensor:
    if value.numel() != 1 or value.dtype not in dtypes:
        raise FormatError(f"{name} is {value.dtype} {list(value.shape)} where one {dtypes[0]} is needed.")
    return value.reshape(1)


def to_unsigned(values: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    codes = values.to(torch.int32) + (1 << bits >> 1)
    if bool(((codes < 0) | (codes >= 1 << bits)).any()):
        raise FormatError(f"{name} holds a number that {bits} bits do not.")
    return codes.to(torch.uint8)


def from_unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int32) - (1 << bits >> 1)).to(torch.int8)
