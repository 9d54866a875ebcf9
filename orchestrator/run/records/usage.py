"""What one worker takes of its machine: memory and processor, as MLflow's page of system metrics shows them."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

import torch


class Usage:
    """Looks at this process; every look covers the time since the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall_s, self._cpu_s = time.monotonic(), _cpu_s()

    def take(self) -> dict[str, float]:
        """Bytes of memory now, the device's too where that is a GPU, and the mean of cores in use."""
        wall_s, cpu_s = time.monotonic(), _cpu_s()
        cores = (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)
        self._wall_s, self._cpu_s = wall_s, cpu_s
        used = {"memory_bytes": float(_resident_bytes()), "cores": cores}
        if self._device.type == "cuda":
            used["gpu_memory_bytes"] = float(torch.cuda.memory_allocated(self._device))
        return used


def _cpu_s() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def _resident_bytes() -> int:
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most there ever was
