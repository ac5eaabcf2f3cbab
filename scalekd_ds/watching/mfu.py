"""Model FLOP utilisation: what a step must compute, over what the device could have computed meanwhile."""

from __future__ import annotations

import torch

from scalekd_ds.config import RunConfig
from scalekd_ds.rng import rng_state, set_rng_state

# dense bf16 matrix products, 10^12 FLOP/s, from the vendor's data sheets; the first name that a device's begins with
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
    "NVIDIA L4": 121.0,
    "Tesla V100": 125.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}


def peak_tflops(name: str) -> float | None:
    """Of a GPU by the name that its driver gives; None where it is unknown. V100's is fp16's: it has no bf16."""
    found = [known for known in PEAK_TFLOPS if name.startswith(known)]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def device_tflops(cfg: RunConfig, device: torch.device) -> float | None:
    """`run.peak_tflops`, or the device's own; None on CPUs, of which no table could know what they reach."""
    if cfg.run.peak_tflops is not None:
        return cfg.run.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flop_per_image(cfg: RunConfig, num_classes: int, micro_batch: int, autocast: torch.dtype | None) -> float | None:
    """FLOP of one image's part in a step, teacher, forward and backward passes: as PyTorch counts them, on tensors without
    storage. None for models that cannot be built so."""
    from scalekd_ds.plan.measure import step_flop

    # building models draws numbers, and seeds: whether somebody watches must not change the training
    generators = rng_state()
    try:
        return step_flop(cfg, num_classes, micro_batch, autocast) / micro_batch
    # whatever a model does that tensors without storage cannot: no reason to end a run
    except Exception:
        return None
    finally:
        set_rng_state(generators)
