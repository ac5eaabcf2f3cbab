"""Skips steps whose gradients hold NaN or inf, at every ZeRO stage, and stops a run after many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import write_json


def skip_nonfinite(engine: Any) -> None:
    """Makes `engine.step()` skip a step whose gradients hold a NaN or inf on any rank, as DeepSpeed does with ZeRO.

    This is the one time in a step that the host waits for the device: with ZeRO it is DeepSpeed's own question, whether the
    norm of the gradients is finite.
    """
    if engine.zero_optimization_stage() > 0:
        return
    # without ZeRO, the optimizer is torch's own
    optimizer = engine.optimizer
    step = optimizer.step

    def guarded(*args: Any, **kwargs: Any) -> Any:
        norm, optimizer.grad_norm = optimizer.grad_norm, None
        if norm is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        # the gradients are already averaged over the ranks, so every rank decides the same
        optimizer.overflow = not bool(torch.isfinite(norm))
        return None if optimizer.overflow else step(*args, **kwargs)

    optimizer.overflow = False
    # of this step, where somebody has found it; clipping makes nothing finite that was not
    optimizer.grad_norm = None
    optimizer.step = guarded


def unsharded_grad_norm(engine: Any) -> torch.Tensor | None:
    """The norm of the averaged gradients before clipping, without ZeRO; None with ZeRO, where DeepSpeed reports it.

    Call it after the step's last backward pass: what `skip_nonfinite` has made of `engine.step()` asks this norm.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.optimizer.grad_norm = norm
    return norm


class NonfiniteGuard:
    """Counts skipped steps, restores the buffers that they changed, and ends the run after `limit` of them in a row.

    Args:
        module: Module whose floating-point buffers, such as BatchNorm's statistics, are restored.
        folder: Folder for the report on the last skipped step.
        limit: Number of skipped steps in a row at which the run stops.

    Attributes:
        count: Skipped steps so far.
        consecutive: Skipped steps since the last one that was applied.
    """

    def __init__(self, module: nn.Module, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.count = self.consecutive = 0
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._last_finite = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def step_done(self, applied: bool, report: Callable[[], dict[str, Any]]) -> None:
        """Call it after each optimizer step.

        Args:
            applied: Whether the step changed the weights.
            report: Function that makes the report for a run that stops: samples and statistics of tensors.

        Raises:
            UserError: `limit` steps in a row were skipped.
        """
        if applied:
            self.consecutive = 0
            if self._buffers:
                torch._foreach_copy_(self._last_finite, self._buffers)
            return
        self.count, self.consecutive = self.count + 1, self.consecutive + 1
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._last_finite)
        if self.consecutive >= self.limit:
            found = report()
            path = self.folder / f"nonfinite_rank{found.get('rank', 0)}.json"
            where = f"are in {path}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
            except OSError as error:
                where = f"would be in {path}, which cannot be written ({error.strerror})"
            raise UserError(
                f"gradients were not finite in {self.consecutive} steps in a row, the last step {found.get('step')}: "
                f"its samples and the statistics of its tensors {where}. A lower --optim.lr, --optim.clip 1.0, or "
                "a look at these images may help; the last checkpoint is from before."
            )


def statistics(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Shape, dtype, smallest, largest and mean finite value, and number of non-finite values of each (name, tensor)."""
    found = {}
    for name, tensor in tensors:
        values = tensor.detach()
        finite = values[torch.isfinite(values)].float()
        summary = (
            {"min": finite.min().item(), "max": finite.max().item(), "mean": finite.mean().item()}
            if len(finite)
            else {}
        )
        found[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "nonfinite": values.numel() - len(finite),
            **summary,
        }
    return found
