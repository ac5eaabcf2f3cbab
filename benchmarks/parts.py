"""Where a step's time goes, by a pass of its own in which every part waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import harness
import published
import torch

import scalekd_ds.distiller
from scalekd_ds.distiller import ScaleKD


class Clock:
    """Seconds by part; a part inside another one is taken off the outer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._open = device, {}, []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            harness.synchronise(self.device)
            begin = time.perf_counter()
            self._open.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                harness.synchronise(self.device)
                spent, inside = time.perf_counter() - begin, self._open.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - inside
                if self._open:
                    self._open[-1] += spent

        return run


def _places(name: str, distiller: ScaleKD) -> list[tuple[str, Any, str]]:
    """(part, object, attribute) of everything in a forward pass that is timed."""
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
    """Milliseconds and share of each part of a step, `other` being the rest of it; empty without repeats.

    The mean of `repeats` steps. Waiting at every border makes the sum longer than an undisturbed step on a GPU.
    """
    if not repeats:
        return {}
    clock = Clock(device)
    with ExitStack() as stack:
        places = _places(name, distiller)
        places += [("backward", torch.Tensor, "backward"), ("optimizer", optimizer, "step")]
        for part, owner, attribute in places:
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
