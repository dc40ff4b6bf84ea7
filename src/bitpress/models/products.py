"""Modules of a model that compute the product with their weight by a compressed layer, whose input is rounded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bitpress.errors import CheckpointError, NumericsError
from bitpress.formats import CompressedLayer
from bitpress.kernels.product import LayerProduct

__all__ = ["no_product", "products_as_they_are", "products_instead", "set_products_"]


def set_products_(model: torch.nn.Module, layers: Mapping[str, CompressedLayer], device: torch.device) -> None:
    """Let layers compute the products with weights by the weights' names, on a device. Raises CheckpointError where a module cannot."""
    for name, layer in layers.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if (why := no_product(module, name)) is not None:
            raise CheckpointError(f"{name}: its input is rounded ({layer.input and layer.input.name}), and {why}.")
        module.forward = partial(_forward, name, module, LayerProduct(layer.to(device), keep=True))


@contextmanager
def products_as_they_are(module: torch.nn.Module) -> Iterator[None]:
    """Let every module below this one compute its own product in the meantime."""
    held: list[tuple[Any, Any]] = [(m, m.__dict__.pop("forward")) for m in module.modules() if "forward" in m.__dict__]
    try:
        yield
    finally:
        for below, forward in held:
            below.forward = forward


@contextmanager
def products_instead(model: torch.nn.Module, layers: Mapping[str, CompressedLayer]) -> Iterator[None]:
    """Let other layers compute products in the meantime; a gradient reaches their tensors."""
    modules: list[Any] = [model.get_submodule(name.rpartition(".")[0]) for name in layers]
    held = [module.__dict__.get("forward") for module in modules]
    for (name, layer), module in zip(layers.items(), modules, strict=True):
        module.forward = partial(_forward, name, module, LayerProduct(layer, keep=True))
    try:
        yield
    finally:
        for module, forward in zip(modules, held, strict=True):
            module.__dict__.pop("forward")
            if forward is not None:
                module.forward = forward


def no_product(module: torch.nn.Module, name: str) -> str | None:
    """Return why a layer cannot compute the product with a weight in its module's place; None if it can."""
    from transformers.pytorch_utils import Conv1D

    plain = type(module) in (torch.nn.Linear, Conv1D) and name.endswith(".weight")
    return None if plain else f"{type(module).__name__} is no plain linear layer"


def _forward(name: str, module: Any, product: LayerProduct, x: torch.Tensor) -> torch.Tensor:
    try:
        return product(x, module.bias)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
