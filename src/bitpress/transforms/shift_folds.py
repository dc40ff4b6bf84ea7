"""Shift folds: find by trial which norms can take the shift of an input into their bias, in any architecture.

    norm: bias - z        layers behind it: bias + w z

The norm and the layers need biases. That the norm makes this input, and that nothing else reads it, is known of the fold of its factors (`folding`).
Here its bias is moved, the layers' biases make up for it, and the block's output must be as before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.transforms.folding import Consumer, Fold

__all__ = ["ShiftFold", "find_shift_folds", "layer_bias", "norm_bias"]

SEED = 20240208


@dataclass(frozen=True)
class ShiftFold:
    """The module within the block whose bias takes the shift, and those whose biases make up for it."""

    producer: str
    consumers: tuple[str, ...]


def norm_bias(
    bias: Float[torch.Tensor, " in"], shift: Float[torch.Tensor, " in"]
) -> tuple[Float[torch.Tensor, " in"], Float[torch.Tensor, " in"]]:
    """Return a norm's bias after a shift, and the shift that it takes once rounded to its type."""
    new = (bias.to(shift.dtype) - shift).to(bias.dtype)
    return new, bias.to(shift.dtype) - new.to(shift.dtype)


def layer_bias(
    bias: Float[torch.Tensor, " out"], w: Float[torch.Tensor, "out in"], shift: Float[torch.Tensor, " in"]
) -> Float[torch.Tensor, " out"]:
    """Return the bias of a layer whose input is shifted."""
    return (bias.to(shift.dtype) + w.to(shift.dtype) @ shift).to(bias.dtype)


@torch.no_grad()
def find_shift_folds(
    block: torch.nn.Module, run: Callable[[], torch.Tensor], groups: Sequence[Sequence[Consumer]], folds: Mapping[int, Fold]
) -> dict[int, ShiftFold]:
    """Return, by group index, the folds of shifts among groups whose factors fold into norms.

    `run` runs the block on fixed tokens and returns its output `[..., hidden]`. The block's parameters are as before when this returns.
    """
    owners = {m.weight.data_ptr(): (name, m) for name, m in block.named_modules() if _has(m, "weight") and _has(m, "bias")}
    base = run().float()
    eps = torch.finfo(next(block.parameters()).dtype).eps
    generator = torch.Generator().manual_seed(SEED)
    found: dict[int, ShiftFold] = {}
    for g, fold in folds.items():
        norm = block.get_submodule(fold.producer)
        behind = [owners.get(c.view.data_ptr()) for c in groups[g]]
        layers = [entry for entry in behind if entry is not None]
        if fold.kind == "rows" or not _has(norm, "bias") or len(layers) < len(behind):
            continue
        shift = torch.randn(fold.channels, generator=generator).to(base.device)
        bias, taken = norm_bias(norm.get_parameter("bias").detach(), shift)
        with _biases({norm: bias}):
            change = (run().float() - base).norm()
        made_up = {
            m: layer_bias(m.get_parameter("bias").detach(), c.view if c.out_first else c.view.T, taken)
            for (_, m), c in zip(layers, groups[g], strict=True)
        }
        with _biases({norm: bias, **made_up}):
            error = (run().float() - base).norm()
        # Shifted inputs round in other places, and biases once more; another reader of the norm would leave much of the change.
        if change > 0 and error <= max(1e-3, 16 * eps) * change:
            found[g] = ShiftFold(fold.producer, tuple(name for name, _ in layers))
    return found


def _has(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module._parameters.get(name), torch.nn.Parameter)


@contextmanager
def _biases(values: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Use other biases in the meantime."""
    kept = {module: module._parameters["bias"] for module in values}
    try:
        for module, value in values.items():
            module._parameters["bias"] = torch.nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, parameter in kept.items():
            module._parameters["bias"] = parameter
