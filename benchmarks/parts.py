"""Measures the parts of a step, in separate steps in which every part waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import published
import timing
import torch

import scalekd_ds.distiller
from scalekd_ds.distiller import ScaleKD


class Clock:
    """Sums seconds by part; the time of a part inside another one is subtracted from the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._open = device, {}, []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls `call`, and adds its seconds to the part `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            timing.synchronise(self.device)
            begin = time.perf_counter()
            self._open.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                timing.synchronise(self.device)
                spent, inside = time.perf_counter() - begin, self._open.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - inside
                if self._open:
                    self._open[-1] += spent

        return run


def _timed_attributes(name: str, distiller: ScaleKD) -> list[tuple[str, Any, str]]:
    """(part, object, attribute) of each function in the forward pass of a variant that is timed."""
    if name.startswith("published"):
        names = {"teacher": "run_teacher", "student": "run_student", "CAP": "run_projector", "TPP": "run_last_stage"}
        places = [(part, published, attribute) for part, attribute in names.items()]
        return places + [("loss", published, attribute) for attribute in ("label_loss", "kd_loss", "view_loss")]
    places = [("teacher", distiller, "teacher_targets"), ("student", distiller.tapped_student, "forward")]
    places += [("CAP", pair, "forward") for pair in distiller.projectors.values()]
    places += [("TPP", distiller.teacher, "last_stage")]
    losses = ("label_loss", "logit_kd", "dual_view_losses")
    return places + [("loss", scalekd_ds.distiller, attribute) for attribute in losses]


def profile(
    name: str,
    step: Callable[[], Any],
    distiller: ScaleKD,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Milliseconds and share of each part of a step, the mean over some steps.

    On a GPU their sum is longer than an undisturbed step, since every part waits for the device.

    Args:
        name: The variant, such as `ours-bf16`.
        step: Runs a step of it.
        distiller: Its distiller.
        optimizer: Its optimizer.
        device: Where it runs.
        repeats: Number of steps.

    Returns:
        Part -> `ms` and `share`, where `other` is the rest of the step; empty for 0 repeats.
    """
    if not repeats:
        return {}
    clock = Clock(device)
    with ExitStack() as stack:
        attributes = _timed_attributes(name, distiller)
        attributes += [("backward", torch.Tensor, "backward"), ("optimizer", optimizer, "step")]
        for part, owner, attribute in attributes:
            stack.enter_context(mock.patch.object(owner, attribute, clock.timed(part, getattr(owner, attribute))))
        begin = time.perf_counter()
        for _ in range(repeats):
            clock.timed("other", step)()
        total = time.perf_counter() - begin
    order = ["teacher", "student", "CAP", "TPP", "loss", "backward", "optimizer", "other"]
    return {
        part: {"ms": 1e3 * clock.seconds[part] / repeats, "share": clock.seconds[part] / total}
        for part in order
        if part in clock.seconds
    }
