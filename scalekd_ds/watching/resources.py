"""Memory and energy, where the machine tells."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

_GIB = 2**30
_POWERCAP = Path("/sys/class/powercap")


def memory(device: torch.device) -> dict[str, float]:
    """`system/host_rss_gib` of this process and, on a GPU, what its allocator holds: `system/gpu_peak_gib` since the last
    call, and `system/gpu_reserved_gib`, with what it keeps for reuse."""
    found = {"system/host_rss_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        found["system/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        found["system/gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return found


class Energy:
    """Joules that this rank's hardware has used since this was made: its GPU (NVML), or its node's CPUs (RAPL) where it is
    the first rank there. `joules` is None where nothing can be read.

    Args:
        device: Of this rank.
        powercap: The kernel's folder of RAPL counters.
    """

    def __init__(self, device: torch.device, powercap: Path = _POWERCAP) -> None:
        self._gpu = _nvml(device) if device.type == "cuda" else None
        self._packages: list[tuple[Path, int]] = []
        if device.type == "cpu" and os.environ.get("LOCAL_RANK", "0") == "0":
            # intel-rapl:0 is a socket; intel-rapl:0:1 is a part of it
            for folder in sorted(powercap.glob("intel-rapl:*")):
                limit = folder / "max_energy_range_uj"
                if folder.name.count(":") == 1 and _number(folder / "energy_uj") is not None:
                    self._packages.append((folder / "energy_uj", _number(limit) or 0))
        self._last = self._read()
        self.joules: float | None = 0.0 if self._last else None

    def update(self) -> float | None:
        """Adds what was used since the last call. A CPU's counter turns over: within the hour at full load."""
        now = self._read()
        if self.joules is not None and len(now) == len(self._last):
            for (value, size), (before, _) in zip(now, self._last, strict=True):
                self.joules += (value - before if value >= before else value - before + size) / 1e6
            self._last = now
        return self.joules

    def _read(self) -> list[tuple[int, int]]:
        """(microjoules, size of the counter) of each source."""
        if self._gpu is not None:
            return [(self._gpu() * 1000, 0)]
        values = [(_number(path), size) for path, size in self._packages]
        return [(value, size) for value, size in values if value is not None]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml(device: torch.device):
    """A function that reads the GPU's millijoules since its driver was loaded, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    # without the library, the driver, or a GPU that counts (Volta and later do)
    except Exception:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
