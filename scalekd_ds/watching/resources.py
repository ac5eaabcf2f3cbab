"""Memory and energy that a run uses, as far as the machine reports them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

_GIB = 2**30
_POWERCAP = Path("/sys/class/powercap")


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, since the last call.

    Args:
        device: The device of this rank.

    Returns:
        `system/host_rss_gib`: Resident host memory now.
        `system/gpu_peak_gib`: On a GPU, the largest memory of its tensors.
        `system/gpu_reserved_gib`: On a GPU, the largest memory of its allocator, with what that keeps for reuse.
    """
    found = {"system/host_rss_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        found["system/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        found["system/gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return found


class Energy:
    """Energy that this rank's hardware has used since this object was made.

    On a GPU it is that of the GPU (read by NVML). On a CPU the first rank of each node counts all CPUs of the node (read by
    RAPL), and other ranks count nothing. A counter that fails later ends nothing: the energy is not known from then on.

    Args:
        device: The device of this rank.
        powercap: The kernel's folder of RAPL counters.

    Attributes:
        joules: The energy, or None if no counter can be read, or one could no more.
        is_lost: Whether a counter that could be read cannot any more.
    """

    def __init__(self, device: torch.device, powercap: Path = _POWERCAP) -> None:
        self._gpu_millijoules = _nvml_counter(device) if device.type == "cuda" else None
        self._packages: list[tuple[Path, int]] = []
        if device.type == "cpu" and os.environ.get("LOCAL_RANK", "0") == "0":
            # intel-rapl:0 is a socket, whose counter includes its parts, such as intel-rapl:0:1
            for folder in sorted(powercap.glob("intel-rapl:*")):
                limit = folder / "max_energy_range_uj"
                if folder.name.count(":") == 1 and _read_number(folder / "energy_uj") is not None:
                    self._packages.append((folder / "energy_uj", _read_number(limit) or 0))
        self._last = self._read()
        self.joules: float | None = 0.0 if self._last else None
        self.is_lost = False

    def update(self) -> float | None:
        """Adds the energy since the last call, and returns `joules`.

        A CPU's counter may wrap at most once in between, which takes about an hour at full load.
        """
        now = self._read()
        if self.joules is not None and len(now) != len(self._last):
            self.joules, self.is_lost = None, True
            print(
                "warning: the energy counter cannot be read any more: joules are not known", file=sys.stderr, flush=True
            )
        if self.joules is not None:
            for (value, size), (before, _) in zip(now, self._last, strict=True):
                self.joules += (value - before if value >= before else value - before + size) / 1e6
            self._last = now
        return self.joules

    def _read(self) -> list[tuple[int, int]]:
        """(microjoules, value at which the counter wraps) of each counter that answers."""
        if self._gpu_millijoules is not None:
            millijoules = self._gpu_millijoules()
            return [] if millijoules is None else [(millijoules * 1000, 0)]
        values = [(_read_number(path), size) for path, size in self._packages]
        return [(value, size) for value, size in values if value is not None]


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml_counter(device: torch.device) -> Callable[[], int | None]:
    """A function that reads the GPU's millijoules since its driver was loaded; it gives None where they cannot be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    # there is no pynvml, no driver, or no GPU of that name
    except Exception:
        return lambda: None

    def millijoules() -> int | None:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        # a GPU before Volta has no counter; one that is lost, or whose driver is loaded anew, answers no more
        except pynvml.NVMLError:
            return None

    return millijoules
