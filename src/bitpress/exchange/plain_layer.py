"""The layers that most ecosystems can hold: one term of codes, and at most another order of its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Integer as Int

from bitpress.errors import BitpressError, FormatError
from bitpress.formats import CompressedLayer, CompressedWeight, Format, InputFormat, Packed, parse_format
from bitpress.formats.grids.grid import Params
from bitpress.formats.maps.map import Permutation

__all__ = ["PlainLayer", "make_packed", "make_plain", "order_of_groups", "plain_layer", "unpack_plain"]


@dataclass(frozen=True)
class PlainLayer:
    """What the specification of such a layer says. `ordered`: its inputs are taken in another order."""

    format: Format
    shape: tuple[int, int]
    ordered: bool


def plain_layer(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None) -> PlainLayer | str:
    """Return what a specification says, or why the layer is not such a one."""
    if input_spec is not None:
        return f"the input of its product is rounded ({input_spec['format']})"
    kinds = [term["kind"] for term in spec["terms"]]
    if kinds != ["packed"]:
        return f"it is a sum of terms ({' + '.join(kinds)})" if len(kinds) > 1 else f"it is stored as {kinds[0]}, not as codes"
    for side in ("input_map", "output_map"):
        change = spec[side]
        if change is not None and (side == "output_map" or change["kind"] != Permutation.kind):
            return (
                f"its {'inputs' if side == 'input_map' else 'outputs'} go through a map when the model runs ({_kinds(change)})"
            )
    try:
        fmt = parse_format(spec["terms"][0]["format"])
    except BitpressError as error:
        return str(error)
    return PlainLayer(fmt, (spec["shape"][0], spec["shape"][1]), spec["input_map"] is not None)


def _kinds(change: Mapping[str, Any]) -> str:
    return str(change["kind"])


def unpack_plain(layer: CompressedLayer) -> tuple[PlainLayer, torch.Tensor, Params, torch.Tensor | None]:
    """Return the specification, codes and parameters of such a layer, and the order of its inputs. Raises FormatError."""
    plain = plain_layer(layer.weight.spec(), layer.input_spec())
    if isinstance(plain, str):
        raise FormatError(f"{plain}.")
    term, change = layer.weight.terms[0], layer.weight.input_map
    assert isinstance(term, Packed)
    assert change is None or isinstance(change, Permutation)
    if term.parts > 1:
        raise FormatError("it is a stack of matrices, which are stored one by one.")
    return plain, *term.unpack(), None if change is None else change.order.long()


def make_plain(fmt: Format, codes: torch.Tensor, params: Params, order: torch.Tensor | None = None) -> CompressedLayer:
    """Put such a layer together and check it. Raises FormatError."""
    term = Packed.pack(fmt, codes, params)
    term.check()
    return CompressedLayer(CompressedWeight((term,), None if order is None else Permutation.of(order)))


def make_packed(
    fmt: Format,
    shape: tuple[int, int],
    tensors: Mapping[str, torch.Tensor],
    order: torch.Tensor | None = None,
    input: InputFormat | None = None,
) -> CompressedLayer:
    """Put such a layer together of the tensors of its term as we store them, and check it. Raises FormatError."""
    made = CompressedLayer(
        CompressedWeight((Packed(fmt, shape, tensors),), None if order is None else Permutation.of(order)), input
    )
    return CompressedLayer.build(made.weight.spec(), made.tensors(), made.input_spec())


def order_of_groups(groups: torch.Tensor | None, width: int, group: int) -> Int[torch.Tensor, " in"] | None:
    """Return the order that puts the inputs of every group side by side; None if they are already."""
    if groups is None:
        return None
    if tuple(groups.shape) != (width,) or groups.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"g_idx is {groups.dtype} {list(groups.shape)} where the group of each of {width} inputs is needed.")
    groups = groups.long()
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(width) // group):
        raise FormatError(f"g_idx does not put {group} inputs into each of {width // group} groups.")
    return None if torch.equal(order, torch.arange(width)) else order
