"""The ways to make a distillation step that `step.py` measures: ours and the published structure, by precision."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import harness
import pairs
import published
import torch

from scalekd_ds.build import build_distiller
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.determinism import choose_algorithms
from scalekd_ds.optim.optimizers import build_optimizer

# ImageNet-1K's, and what timm builds by default
CLASSES = 1000


def forward_of(
    distiller: ScaleKD, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Callable[[], dict[str, torch.Tensor]]:
    """The library's losses, as its trainer asks for them."""
    images, labels = batch

    def forward() -> dict[str, torch.Tensor]:
        # outside of autocast, as in the trainer: the teacher has its own
        targets = distiller.teacher_targets(images)
        with _autocast(images.device, dtype):
            return distiller(images, labels, targets)

    return forward


def published_forward_of(
    distiller: ScaleKD, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Callable[[], dict[str, torch.Tensor]]:
    """The losses in the published structure; `distiller` is of `published_distiller`."""
    images, labels = batch

    def forward() -> dict[str, torch.Tensor]:
        with _autocast(images.device, dtype):
            return published.losses(distiller, images, labels)

    return forward


def passes_of(forward: Callable[[], dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Forward and backward."""

    def passes() -> None:
        optimizer.zero_grad()
        forward()["loss/total"].backward()

    return passes


def step_of(passes: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Forward, backward, optimizer."""

    def step() -> None:
        passes()
        optimizer.step()

    return step


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass
class Variant:
    """One way to make the step.

    Attributes:
        distiller: With its own teacher, and the same trainable weights as the others'.
        forward: The losses.
        passes: Forward and backward.
        step: Both, and the optimizer.
    """

    distiller: ScaleKD
    forward: Callable[[], dict[str, torch.Tensor]]
    passes: Callable[[], None]
    step: Callable[[], None]


def build_variants(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Variant], torch.optim.Optimizer]:
    """The variants by name, and the optimizer of all."""
    cfg = pairs.config_of(args.pair, args.recipe)
    # as the trainer: on a GPU, cuDNN tries its convolutions for each shape
    choose_algorithms(False, device.type)
    distiller = build_distiller(cfg, CLASSES, verbose=True).to(device).train()
    optimizer = build_optimizer(distiller, cfg.optim)
    images = torch.randn(args.batch, 3, *distiller.image_size, device=device)
    batch = images, torch.randint(CLASSES, (args.batch,), device=device)
    variants = {}
    for name in args.variants:
        whose, _, precision = name.partition("-")
        dtype = harness.DTYPES[precision]
        if whose == "published":
            used = published.published_distiller(distiller)
            forward = published_forward_of(used, batch, dtype)
        else:
            used = distiller
            if dtype != torch.float32:
                used = published.with_teacher(distiller, copy.deepcopy(distiller.teacher).lower_precision(dtype))
            forward = forward_of(used, batch, dtype)
        if dtype == torch.float32:
            # a decorator here, on the backward pass too
            forward = harness.without_tf32()(forward)
        passes = passes_of(forward, optimizer)
        if dtype == torch.float32:
            passes = harness.without_tf32()(passes)
        variants[name] = Variant(used, forward, passes, step_of(passes, optimizer))
    return variants, optimizer
