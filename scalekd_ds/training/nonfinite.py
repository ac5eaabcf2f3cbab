"""NaN and inf: the step is skipped, on every rank and at every ZeRO stage, counted, and explained when it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_ds.durable_files import write_json
from scalekd_ds.errors import UserError


def skip_nonfinite(engine: Any) -> None:
    """Lets `engine.step()` skip a step whose gradients hold a NaN or inf on any rank, as it does for fp16.

    DeepSpeed looks for them with ZeRO-1 and 2; with ZeRO-3 in fp32 and without ZeRO it does not.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        _skip_unsharded(engine)
    elif stage == 3:

        def check(update_scale: bool = True) -> bool:
            optimizer.overflow = False
            optimizer.check_overflow()
            return optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else optimizer.overflow

        optimizer._overflow_check_and_loss_scale_update = check


def _skip_unsharded(engine: Any) -> None:
    optimizer = engine.optimizer
    step = optimizer.step

    def guarded(*args: Any, **kwargs: Any) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # averaged over ranks by now: every rank sees the same
        optimizer.overflow = not bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))
        return None if optimizer.overflow else step(*args, **kwargs)

    optimizer.overflow = False
    optimizer.step = guarded


class Nonfinite:
    """Counts skipped steps, takes back what they did to buffers, and ends the run after `limit` in a row.

    Args:
        module: Whose BatchNorm statistics a NaN must not reach for good.
        folder: Where the report of the last one goes.
        limit: Skipped steps in a row after which the run stops.
    """

    def __init__(self, module: nn.Module, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.count = self.in_a_row = 0
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._kept = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def step_done(self, applied: bool, report: Callable[[], dict[str, Any]]) -> None:
        """After each optimizer step.

        Args:
            applied: Whether the step changed the weights.
            report: What to write when the run stops: sample ids and statistics of tensors.

        Raises:
            UserError: `limit` steps in a row were skipped.
        """
        if applied:
            self.in_a_row = 0
            if self._buffers:
                torch._foreach_copy_(self._kept, self._buffers)
            return
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if self.in_a_row >= self.limit:
            found = report()
            path = self.folder / f"nonfinite_rank{found.get('rank', 0)}.json"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            raise UserError(
                f"gradients were not finite in {self.in_a_row} steps in a row, the last step {found.get('step')}: its "
                f"samples and the statistics of its tensors are in {path}. A lower --optim.lr, --optim.clip 1.0, or a "
                "look at these images may help; the last checkpoint is from before."
            )


def statistics(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Shape, dtype, smallest, largest and mean finite value, and the number of values that are not finite."""
    found = {}
    for name, tensor in tensors:
        values = tensor.detach()
        finite = values[torch.isfinite(values)].float()
        shown = (
            {"min": finite.min().item(), "max": finite.max().item(), "mean": finite.mean().item()}
            if len(finite)
            else {}
        )
        found[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "nonfinite": values.numel() - len(finite),
            **shown,
        }
    return found
