"""The device that computes: the processor, or a GPU through CUDA.

A device takes one block of a model at a time, with its statistics and one batch of hidden states; everything else stays on the host.
Random numbers are drawn on the host and moved, so that every device has the same ones.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitpress.errors import UsageError
from bitpress.settings import default_device, use_fixed_workspace

__all__ = ["CPU", "computing_on", "device_name", "find_device", "peak_device_bytes", "usable_bytes"]

CPU = torch.device("cpu")
_NAMES = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def find_device(name: str | None = None) -> torch.device:
    """Return the device of a name: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`; without one that of BITPRESS_DEVICE.

    Raises UsageError for another name, and for a device that is not there.
    """
    given = default_device() if name is None else name
    if not _NAMES.fullmatch(given):
        raise UsageError(f"device {given!r}: use auto, cpu, cuda, or cuda:N for one of several GPUs.")
    if given == "cpu":
        return CPU
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given == "auto":
        return torch.device("cuda", 0) if found else CPU
    index = int(given.partition(":")[2] or 0)
    if index >= found:
        raise UsageError(f"device {given}: {_found(found)}; use --device {f'cuda:{found - 1}, or ' if found else ''}cpu.")
    return torch.device("cuda", index)


@contextmanager
def computing_on(name: str | None = None, memory: int | None = None) -> Iterator[torch.device]:
    """Compute on the device of a name (`find_device`) for a while: with at most `memory` bytes of it, in exact float32, and with the same
    results every time where torch can. What was set before comes back.

    Raises UsageError for a device that is not there, and for a limit beyond it, or of the processor.
    """
    device = find_device(name)
    if memory is not None:
        check_limit(device, memory)
    if device.type != "cuda":
        yield device
        return
    use_fixed_workspace()
    settings: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    sums = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    strict, warning = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.cuda.init()  # its statistics cannot be reset before
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if memory is not None:
            torch.cuda.set_per_process_memory_fraction(memory / total_bytes(device), device)
        with warnings.catch_warnings():
            # An operation without a deterministic version is not refused: docs/devices.md says how far "the same" goes.
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield device
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = sums
        torch.use_deterministic_algorithms(strict, warn_only=warning)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        if memory is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_limit(device: torch.device, memory: int) -> None:
    """Raise UsageError for a limit of device memory that is beyond the device, or that the processor cannot have."""
    if device.type == "cpu":
        raise UsageError("--device-memory is for a GPU, and the processor computes here; leave it out, or use --device cuda.")
    if device.type == "cuda" and memory > total_bytes(device):
        raise UsageError(f"--device-memory {memory:,} bytes: {device_name(device)} has {total_bytes(device):,}; use less.")


def total_bytes(device: torch.device) -> int:
    """Return the memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def usable_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that a run may take: what is free, and at most what `computing_on` allows."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return min(int(free) + held, int(total * torch.cuda.get_per_process_memory_fraction(device)))


def device_name(device: torch.device) -> str:
    """Return a device's name for a report: `cpu`, `NVIDIA H100 80GB HBM3`."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def peak_device_bytes(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on a GPU since `computing_on` began; None for the processor."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def _found(count: int) -> str:
    if count:
        return f"there {'is' if count == 1 else 'are'} {count} GPU{'s' * (count != 1)} here, counted from cuda:0"
    built = (
        f"torch {torch.__version__} finds no GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    )
    return f"there is no GPU here that can be used ({built})"
