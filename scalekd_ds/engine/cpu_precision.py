"""What a run on CPUs in a 16-bit type is told: that no GPU was found, and that its CPU emulates the type."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# as the kernel names the instructions; the last one is ARM's
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "asimdhp"),
}
# what oneDNN may be held to, in the variable with which it emulates an older CPU
_LIMITS = {
    torch.bfloat16: ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"),
    torch.float16: ("FP16", "AVX10", "ALL", "DEFAULT"),
}


def cpu_computes_in(dtype: torch.dtype, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products in `dtype`; True where nothing says which it has.

    Args:
        dtype: A floating-point type.
        cpuinfo: The kernel's description of the CPUs.
    """
    if dtype not in _INSTRUCTIONS:
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in limit for name in _LIMITS[dtype]):
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = [set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))]
    return not flags or bool(flags[0].intersection(_INSTRUCTIONS[dtype]))


def slow_precision_notice(dtype: torch.dtype | None, ds_config: str) -> str | None:
    """One line for a run on CPUs that asks for a type which its CPU emulates, with the cure; None where all is well.

    Args:
        dtype: The run's autocast type, or None for float32.
        ds_config: Name of the DeepSpeed JSON that asks for it.
    """
    if dtype is None or cpu_computes_in(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{ds_config} computes in {name}, which this CPU emulates, many times slower than float32: "
        "--run.ds_config cpu_fp32 is the fast one here"
    )


def missing_gpu_notice(dtype: torch.dtype | None) -> str | None:
    """One line for a run that is on CPUs although PyTorch is built for GPUs, as in a container that was given none.

    Args:
        dtype: The run's autocast type, or None for float32, which is what a run that is meant for CPUs computes in.

    Returns:
        None where the run, PyTorch or DS_ACCELERATOR asks for CPUs.
    """
    if dtype is None or torch.version.cuda is None or os.environ.get("DS_ACCELERATOR"):
        return None
    return (
        "no GPU was found, and the run is on the CPU: `nvidia-smi` has to list one, and a container is given them by "
        "`docker run --gpus all`; DS_ACCELERATOR=cpu says that the CPU is meant"
    )
