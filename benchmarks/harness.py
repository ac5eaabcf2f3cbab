"""What every benchmark shares: the machine, its ceilings in the same run, results as JSON and tables; timing.py times."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# name -> type
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- the machine ---------------------------------------------------------------------------------------------------


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What a row of results was measured on."""
    commit = _first_line("git", "rev-parse", "--short=12", "HEAD")
    described = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "commit": commit and commit + ("+changes" if _first_line("git", "status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        described["capability"] = torch.backends.cpu.get_cpu_capability()
    else:
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "sm": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return described


def flush_buffer(device: torch.device) -> torch.Tensor | None:
    """256 MB to drive a GPU's last cache out with; None on a CPU, whose steps are far larger than its caches."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 is float32 within: PyTorch lets cuDNN's convolutions round their inputs to TF32 by default."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def ceilings(device: torch.device, repeats: int, dtypes: Iterable[str]) -> dict[str, float]:
    """What this machine can do at most, measured now.

    Args:
        device: Where.
        repeats: Runs of each, of which the fastest counts.
        dtypes: Names in `DTYPES` whose products are asked for: a type that the device emulates would take minutes.

    Returns:
        `copy_bytes_per_s`: Bytes read and written of a copy far larger than the caches.
        `matmul_flop_per_s/DTYPE`: The faster of a large square product and a 3x3 convolution (on some CPUs they go to
            different libraries, one at half the speed of the other); fp32 is without TF32 in both.
    """
    cuda = device.type == "cuda"
    source = torch.randn((1 << 30 if cuda else 1 << 28) // 4, device=device)
    target = torch.randn_like(source)
    copied = timing.alternate({"copy": lambda: target.copy_(source)}, device, repeats)
    times = timing.seconds_of(copied)["copy"]
    found = {"copy_bytes_per_s": 2 * source.numel() * 4 / min(times)}
    side, batch, channels = (8192, 128, 1024) if cuda else (2048, 8, 256)
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        x = torch.randn(batch, channels, 28, 28, device=device).to(DTYPES[name], memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device).to(DTYPES[name], memory_format=torch.channels_last)
        calls = {"product": lambda a=a, b=b: a @ b, "convolution": lambda x=x, w=w: F.conv2d(x, w, padding=1)}
        flop = {"product": 2 * side**3, "convolution": 2 * 9 * x.numel() * channels}
        with without_tf32():
            times = timing.seconds_of(timing.alternate(calls, device, repeats, warmup=2))
        found[f"matmul_flop_per_s/{name}"] = max(flop[kind] / min(times[kind]) for kind in calls)
    return found


def higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The better of two readings of the ceilings, before and after: a neighbour's load must not pass for a low ceiling."""
    return {name: max(value, other[name]) for name, value in one.items()}


# -- results -------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def results_dir(out: str | None) -> Path:
    """`out`, else the folder that $OUT names, else benchmarks/results."""
    return Path(out or os.environ.get("OUT") or RESULTS)


def shown(value: Any) -> str:
    """A cell of a table: three digits that mean something."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, the first to the left, numbers to the right."""
    cells = [list(head)] + [[shown(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip(), flush=True)
