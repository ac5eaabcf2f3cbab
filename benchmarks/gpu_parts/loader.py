"""The loader on a GPU: decoding alone, and the library's loader with the augmentations of every recipe, with GPU memory.

A recipe with a policy is measured with the policy on the GPU and on the host, and once more without a loader: the
policy's operations on pixels that are on the GPU already.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import timing
import torch
from loader import library_loader

from gpu_parts.images import make_folder
from scalekd_ds.data.on_device import apply_plan, plan_batch
from scalekd_ds.data.policy import Policy
from scalekd_ds.recipes import RECIPES

# images/s of the operations alone on an H100, and what a policy costs of 3,500 images/s: written down before a measurement
PREDICTIONS = {"operations alone": 700_000, "share lost": 0.006}
# fields of `data` by which loaders differ
_FIELDS = ("interpolation", "auto_augment", "random_erasing", "color_jitter", "random_crop", "hflip", "image_size")


def augmentations(dry: bool) -> dict[str, dict[str, Any]]:
    """Name of the first recipe -> fields of `data`; recipes with the same ones are measured once."""
    found: dict[tuple, str] = {}
    for name, build in RECIPES.items():
        if not name.startswith("fashion"):
            data = build().data
            found.setdefault(tuple(getattr(data, field) for field in _FIELDS), name)
    chosen = {name: dict(zip(_FIELDS, values, strict=True)) for values, name in found.items()}
    return {name: fields | {"image_size": 32} for name, fields in list(chosen.items())[:2]} if dry else chosen


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if a loader failed, after the others were measured."""
    device = timing.device_of("cpu" if dry else "cuda")
    end = time.monotonic() + seconds - 20.0
    batch, rounds = (4, 1) if dry else (128, 6)
    found: dict[str, Any] = {"machine": harness.machine(device), "batch": batch, "rows": []}
    found["predictions"] = PREDICTIONS
    with tempfile.TemporaryDirectory() as made:
        images = make_folder(
            Path(made) / "train", 10 if dry else 128, 2 if dry else 16, (48, 40) if dry else (500, 400)
        )
        loaders: dict[str, Callable[[], Iterator]] = {"decoding alone": lambda: decoding(images, batch, device)}
        for name, fields in augmentations(dry).items():
            loaders[name] = lambda f=fields: augmented(images, batch, device, f)
            if fields["auto_augment"]:
                on_host = fields | {"augment_on": "host"}
                loaders[f"{name}, policy on the host"] = lambda f=on_host: augmented(images, batch, device, f)
                loaders[f"{name}, operations alone"] = lambda f=fields: operations(batch, device, f)
        for name, build in loaders.items():
            if time.monotonic() > end:
                found["rows"].append({"loader": name, "error": "not started: no time left"})
                continue
            found["rows"].append({"loader": name, **attempt(build, batch, rounds, device)})
            save(found)
    head = ["", "images/s", "p20", "p80", "GPU MiB", "PyTorch MiB"]
    keys = ("images_per_s", "p20", "p80", "gpu_mib", "torch_mib")
    harness.print_table(head, [[row["loader"], *(row.get(key) for key in keys)] for row in found["rows"]])
    if failed := [f"{row['loader']}: {row['error']}" for row in found["rows"] if "error" in row]:
        raise RuntimeError("; ".join(failed))
    return found


def attempt(build: Callable[[], Iterator], batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Images/s of a loader, and the memory that it takes: DALI's from the device's own count, and PyTorch's peak."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0]
    try:
        batches = build()
        warm, timed = (2, 2) if rounds == 1 else (8, 16)
        for _ in range(warm):
            next(batches)
        readings = [
            timing.wall_seconds(lambda: [next(batches) for _ in range(timed)], device) / timed for _ in range(rounds)
        ]
    except Exception as error:
        return {"error": timing.one_line(error)}
    found = timing.quantiles([batch / seconds for seconds in readings])
    found = {"images_per_s": found.pop("median"), **found}
    if cuda:
        found["gpu_mib"] = (free - torch.cuda.mem_get_info(device)[0]) / 2**20
        found["torch_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def augmented(images: Path, batch: int, device: torch.device, fields: dict[str, Any]) -> Iterator:
    """Batches of the library's loader with fields of `data`."""
    fields, size = dict(fields), fields["image_size"]
    fields.pop("image_size")
    threads = 1 if device.type == "cpu" else harness.machine(device)["cores"]
    return library_loader(images, argparse.Namespace(size=size, batch=batch), fields, threads, device)


def operations(batch: int, device: torch.device, fields: dict[str, Any]) -> Iterator:
    """A policy's operations on noise that is on the device already; their parameters are sent for every batch."""
    size, rng = fields["image_size"], np.random.default_rng(0)
    policy = Policy(fields["auto_augment"], fields["color_jitter"], fields["interpolation"])
    pinned = torch.Tensor.pin_memory if device.type == "cuda" else lambda values: values
    drawn = [[policy.draw(rng) for _ in range(batch)] for _ in range(8)]
    plans = [plan for each in drawn if (plan := plan_batch(each, size, pinned)) is not None]
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    fill = torch.full((3,), 128, dtype=torch.uint8, device=device)
    for plan in itertools.cycle(plans):
        apply_plan(pixels, plan, plan.buffer.to(device, non_blocking=True), fill)
        yield pixels


def decoding(images: Path, batch: int, device: torch.device) -> Iterator:
    """Whole images as DALI decodes them, of their own sizes and without anything else."""
    from nvidia.dali import fn, pipeline_def

    on_gpu = device.type == "cuda"
    threads = 1 if not on_gpu else harness.machine(device)["cores"]

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=0 if on_gpu else None)
    def decode():
        jpegs, labels = fn.readers.file(file_root=str(images), random_shuffle=True, name="files")
        return fn.decoders.image(jpegs, device="mixed" if on_gpu else "cpu"), labels

    pipeline = decode()
    pipeline.build()
    return (pipeline.run() for _ in itertools.count())
