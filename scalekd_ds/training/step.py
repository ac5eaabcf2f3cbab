"""One optimizer step of a run."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist

from scalekd_ds.engine.compilation import naming_the_compiler
from scalekd_ds.engine.determinism import naming_the_setting
from scalekd_ds.engine.zero_layout import shards_of
from scalekd_ds.teacher import TargetsWithoutTPP, TeacherTargets
from scalekd_ds.training.nonfinite import statistics, unsharded_grad_norm
from scalekd_ds.training.run import Run


def train_step(run: Run, batches: Any) -> dict[str, torch.Tensor]:
    """Makes one optimizer step; collective.

    Args:
        run: The run.
        batches: Iterator of micro batches: images (B, 3, H, W), labels (B,) or (B, K), and with a teacher cache its entries.

    Returns:
        The mean of each loss over the micro batches, still on the device.

    Raises:
        UserError: The gradients were not finite in too many steps in a row, torch.compile failed, or an operator has no
            deterministic algorithm where the run asks for such.
    """
    with naming_the_compiler(run.cfg.run.compile), naming_the_setting(run.cfg.run.deterministic):
        return _train_step(run, batches)


def _train_step(run: Run, batches: Any) -> dict[str, torch.Tensor]:
    """As `train_step`."""
    part = run.distiller.time_part
    sums: dict[str, torch.Tensor] = {}
    accumulation = run.engine.gradient_accumulation_steps()
    for micro in range(accumulation):
        with part("data_wait"):
            images, labels, *cached = next(batches)
        if run.mixer is not None:
            images, labels = run.mixer(images, labels, run.step, micro)
        targets: TeacherTargets | TargetsWithoutTPP | None = None
        if run.cache is not None:
            with part("teacher"):
                tokens, logits = run.cache.targets(cached[0])
                targets = TeacherTargets(images.new_empty(0) if tokens is None else tokens, logits)
        elif run.teacher is not None:
            with part("teacher"):
                targets = run.distiller.teacher_targets(images)
        losses = run.engine(images, labels, targets)
        with part("backward"):
            run.engine.backward(losses["loss/total"])
        if run.engine.is_gradient_accumulation_boundary():
            run.grad_norm = unsharded_grad_norm(run.engine)
            # a checkpoint copies the weights as they are before this update
            run.saver.wait_copied()
        with part("optimizer"):
            run.engine.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
    if run.ema is not None:
        with part("optimizer"):
            run.ema.update()
    means = {name: loss / accumulation for name, loss in sums.items()}
    run.nonfinite.step_done(run.engine.was_step_applied(), lambda: nonfinite_report(run, images, means))
    return means


def nonfinite_report(run: Run, images: torch.Tensor, losses: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Reports on a skipped step: the samples of this rank, and statistics of its tensors."""
    sampler = run.train_loader.sampler
    micro_batches = [sampler.indices(run.step, micro)[0].tolist() for micro in range(sampler.accumulation)]
    masters = [(f"weights {number}", shard.flat) for number, shard in enumerate(shards_of(run.engine))]
    return {
        "rank": dist.get_rank(),
        "step": run.step,
        "samples": {i: run.train_loader.source.name(i) for batch in micro_batches for i in batch},
        "tensors": statistics([("images of the last micro batch", images), *losses.items(), *masters]),
    }
