"""Model FLOP utilisation: the FLOP of a step over those that the device could have computed in the same time."""

from __future__ import annotations

import torch

from scalekd_ds.config import RunConfig
from scalekd_ds.rng import rng_state, set_rng_state

# start of a GPU's name -> 10^12 FLOP/s of dense bf16 matrix products, from the vendor's data sheets; the longest match counts
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "Tesla V100": 125.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}


def peak_tflops(name: str) -> float | None:
    """Peak of a GPU in 10^12 FLOP/s, or None if the GPU is not known.

    Args:
        name: The name that the driver gives the GPU. For the V100, which has no bf16, the peak is that of fp16.
    """
    matches = [known for known in PEAK_TFLOPS if name.startswith(known)]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


def device_tflops(cfg: RunConfig, device: torch.device) -> float | None:
    """`run.peak_tflops` if it is set, else the peak of the GPU in 10^12 FLOP/s; None for CPUs and unknown GPUs."""
    if cfg.run.peak_tflops is not None:
        return cfg.run.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flop_per_image(cfg: RunConfig, num_classes: int, micro_batch: int, autocast: torch.dtype | None) -> float | None:
    """FLOP of a step for each image: teacher, forward and backward passes, as PyTorch counts them on fake tensors.

    Args:
        cfg: The run.
        num_classes: Classes of its data.
        micro_batch: Images in a micro batch.
        autocast: The dtype of autocast, or None for float32.

    Returns:
        FLOP, or None if the models cannot run on fake tensors.
    """
    from scalekd_ds.plan.measure import step_flop

    # building models draws random numbers, and watching a run must not change its training
    saved_rng_state = rng_state()
    try:
        return step_flop(cfg, num_classes, micro_batch, autocast) / micro_batch
    # a model may do anything that fake tensors do not support, and that must not end the run
    except Exception:
        return None
    finally:
        set_rng_state(saved_rng_state)
