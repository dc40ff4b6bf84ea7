"""The clock of a run: its time, memory and machine, for the report."""

import platform
import time
from dataclasses import dataclass

import torch

from bitpress import native
from bitpress.devices import CPU, device_name, peak_device_bytes
from bitpress.memory import peak_bytes

__all__ = ["Clock"]


@dataclass(frozen=True)
class Clock:
    """When a run began (`time.perf_counter`), the seconds that compressing took, and the device that computed."""

    started: float
    compressing: float
    device: torch.device = CPU

    def facts(self) -> dict[str, object]:
        """Return the time, the memory, and the machine. The processor has no memory of its own, and is not named."""
        peak = peak_device_bytes(self.device)
        return {
            "seconds": round(time.perf_counter() - self.started, 2),
            "seconds_pressing": round(self.compressing, 2),
            "peak_memory_bytes": peak_bytes(),
            "threads": torch.get_num_threads(),
            "native": sorted(native.features()) if native.available() else None,
            "machine": platform.processor() or platform.machine(),
            **({} if peak is None else {"device": device_name(self.device), "peak_device_memory_bytes": peak}),
        }
