"""Kernels: products with compressed weights. The reference decodes and multiplies; faster ones are tested against it."""

from bitpress.kernels.kernel import Kernel
from bitpress.kernels.table import KERNELS, choose_kernel

__all__ = ["KERNELS", "Kernel", "choose_kernel"]
