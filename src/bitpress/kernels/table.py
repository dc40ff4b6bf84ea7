"""The table of kernels, best first; the first one that does not refuse a weight serves it."""

import torch

from bitpress.errors import KernelUnavailable
from bitpress.formats import CompressedWeight
from bitpress.kernels.kernel import Kernel
from bitpress.kernels.native import Native
from bitpress.kernels.reference import Reference

__all__ = ["KERNELS", "choose_kernel"]

KERNELS: dict[str, type[Kernel]] = {"native": Native, "reference": Reference}


def choose_kernel(weight: CompressedWeight, device: torch.device) -> type[Kernel]:
    """Give the first kernel that takes the weight. Raises KernelUnavailable with every refusal."""
    refusals = []
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(weight, device)
        if reason is None:
            return kernel
        refusals.append(f"{name}: {reason}")
    raise KernelUnavailable("no kernel takes this weight; " + "; ".join(refusals))
