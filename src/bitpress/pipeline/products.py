"""Products: which parameters of a block are weights to compress, whatever the architecture calls them.

A weight is the matrix of a `Linear`, of GPT-2's `Conv1D` (stored [in, out]), or a 3-d tensor of experts. Everything else (norms,
biases, routers) is kept.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch

from bitpress.checkpoints.parameter import WeightParameter

__all__ = ["list_weights"]


def list_weights(
    block_name: str, block: torch.nn.Module, config: Any, skip: Sequence[str]
) -> tuple[list[WeightParameter], dict[str, str]]:
    """List the weights of a block in the order of its modules, and why each other matrix is kept as it is.

    Of the patterns of `skip` the last one that matches decides; one behind "!" takes back what those before leave out.
    """
    from transformers.pytorch_utils import Conv1D

    num_experts = {getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")} - {None}
    weights: list[WeightParameter] = []
    kept: dict[str, str] = {}
    for path, module in block.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            name = ".".join(part for part in (block_name, path, leaf) if part)
            if value.ndim < 2:
                continue
            found: WeightParameter | None = None
            if isinstance(module, torch.nn.Linear) and leaf == "weight":
                if value.shape[0] in num_experts:
                    kept[name] = "router"
                    continue
                found = WeightParameter(name, (value.shape[0], value.shape[1]))
            elif isinstance(module, Conv1D) and leaf == "weight":
                found = WeightParameter(name, (value.shape[1], value.shape[0]), transposed=True)
            elif value.ndim == 3 and hasattr(module, "num_experts") and not leaf.endswith("bias"):
                transposed = bool(getattr(module, "is_transposed", False))
                out, inner = (value.shape[2], value.shape[1]) if transposed else (value.shape[1], value.shape[2])
                found = WeightParameter(name, (out, inner), transposed, experts=value.shape[0])
            if found is None:
                kept[name] = "not a linear product"
            elif _skipped((found.stem, name), skip):
                kept[name] = "skipped as asked"
            else:
                weights.append(found)
    return weights, kept


def _skipped(names: Sequence[str], patterns: Sequence[str]) -> bool:
    matched = (p for p in reversed(patterns) if any(fnmatch.fnmatchcase(name, p.removeprefix("!")) for name in names))
    return not next(matched, "!").startswith("!")
