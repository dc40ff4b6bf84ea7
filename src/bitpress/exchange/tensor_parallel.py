"""Tensor parallelism of vLLM: over how many devices it can divide a model's weights, and the reason against the other numbers.

Of a weight that writes the residual stream, a device has some of the inputs, and what the devices compute is added up
(`RowParallelLinear`). Of any other weight it has some of the outputs: whole heads of an attention, or the inputs of the weight behind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["RULES", "SIZES", "Rule", "ServedModel", "ServedWeight", "padded", "sizes"]

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class ServedWeight:
    """A weight as a server multiplies with it: those that it joins are one.

    shape     [out, in], of one expert
    divided   the inputs are divided among devices; else the outputs are
    group     how many inputs share a scale; None: all of a row
    packed    bits of a code, if codes lie side by side in words of 32 bits; None: they are bytes
    """

    name: str
    shape: tuple[int, int]
    divided: bool
    group: int | None
    packed: int | None


@dataclass(frozen=True)
class ServedModel:
    """queries, keys: numbers of heads, one for each kind of attention that the model has."""

    queries: Sequence[int]
    keys: Sequence[int]
    weights: Sequence[ServedWeight]


@dataclass(frozen=True)
class Rule:
    """What vLLM needs of a model on so many devices; `refuses` returns why it does not have that.

    file, name   where vLLM's code says so
    """

    about: str
    file: str
    name: str
    refuses: Callable[[ServedModel, int], str | None]


def sizes(model: ServedModel) -> dict[int, str | None]:
    """Return the first reason against each number of devices; None where the model can be divided."""
    return {devices: next(filter(None, (rule.refuses(model, devices) for rule in RULES)), None) for devices in SIZES}


def padded(model: ServedModel, devices: int) -> str | None:
    """Return which weight Marlin, vLLM's kernel for packed weights, must pad on so many devices; None: none.

    A shard has a multiple of 64 outputs and of 128 inputs, or the other way round. Since pull request 45295 of vLLM others are padded with
    zeros; before, Marlin refused them, and few other kernels take them. (vllm/model_executor/layers/quantization/utils/marlin_utils.py,
    marlin_padded_nk and verify_marlin_supports_shape)
    """
    for weight in model.weights:
        rows, columns = weight.shape
        rows, columns = (rows, columns // devices) if weight.divided else (rows // devices, columns)
        if weight.packed is not None and not any(rows % a == columns % b == 0 for a, b in ((64, 128), (128, 64))):
            return f"{weight.name}: {rows} outputs and {columns} inputs a device"
    return None


def _queries(model: ServedModel, devices: int) -> str | None:
    odd = next((count for count in model.queries if count % devices), None)
    return None if odd is None else f"{odd} attention heads"


def _keys(model: ServedModel, devices: int) -> str | None:
    odd = next((count for count in model.keys if count % devices and devices % count), None)
    return None if odd is None else f"{odd} heads of keys and values"


def _inputs(model: ServedModel, devices: int) -> str | None:
    odd = next((w for w in model.weights if w.divided and w.shape[1] % devices), None)
    return None if odd is None else f"{odd.name}: {odd.shape[1]} inputs"


def _groups(model: ServedModel, devices: int) -> str | None:
    for weight in model.weights:
        each = _inputs_of(weight, devices)
        if weight.group is not None and each % weight.group:
            return f"{weight.name}: {each} inputs a device, in groups of {weight.group}"
    return None


def _words(model: ServedModel, devices: int) -> str | None:
    for weight in model.weights:
        each = _inputs_of(weight, devices)
        if weight.packed is not None and each * weight.packed % 32:
            return f"{weight.name}: {each} inputs a device, {weight.packed} bits each, do not fill words of 32 bits"
    return None


def _inputs_of(weight: ServedWeight, devices: int) -> int:
    return weight.shape[1] // devices if weight.divided else weight.shape[1]


RULES: tuple[Rule, ...] = (
    Rule(
        "the number of attention heads is a multiple of the devices",
        "vllm/config/model.py",
        "verify_with_parallel_config",
        _queries,
    ),
    Rule(
        "the number of heads of keys and values is a multiple of the devices, or divides them",
        "vllm/model_executor/layers/linear.py",
        "QKVParallelLinear",
        _keys,
    ),
    Rule(
        "the inputs of an output projection or a down projection, of an expert too, are a multiple of the devices",
        "vllm/model_executor/layers/linear.py",
        "RowParallelLinear",
        _inputs,
    ),
    Rule(
        "a device has whole groups of inputs",
        "vllm/distributed/utils.py",
        "verify_group_size_divides_partition",
        _groups,
    ),
    Rule(
        "a device has whole words of packed codes",
        "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py",
        "pack_factor",
        _words,
    ),
)
