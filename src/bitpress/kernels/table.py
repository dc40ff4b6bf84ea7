"""The table of kernels, the fastest first, and the choice of one for a layer."""

from bitpress.errors import KernelUnavailable
from bitpress.formats import CompressedLayer
from bitpress.kernels.kernel import Kernel
from bitpress.kernels.native import Native
from bitpress.kernels.reference import Reference

__all__ = ["KERNELS", "choose_kernel"]

KERNELS: dict[str, type[Kernel]] = {"native": Native, "reference": Reference}


def choose_kernel(layer: CompressedLayer) -> Kernel:
    """Return the first kernel of the table that takes a layer. Raises KernelUnavailable with every refusal.

    It is called once, when a layer is loaded; the layer keeps its kernel.
    """
    refusals = {name: kernel.refuses(layer) for name, kernel in KERNELS.items()}
    for name, reason in refusals.items():
        if reason is None:
            return KERNELS[name]()
    raise KernelUnavailable("no kernel takes this layer; " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))
