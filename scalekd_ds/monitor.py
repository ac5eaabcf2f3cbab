"""What a person sees of a run: TensorBoard through DeepSpeed's monitor, and a bar or plain lines on rank 0."""

from __future__ import annotations

import sys
from typing import Any

from deepspeed import comm as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Monitor:
    """Writes scalars on rank 0.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # engine.monitor would add DeepSpeed's own scalars, flushed at every step
        self._monitor = MonitorMaster(get_monitor_config(config))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes `scalars` at an optimizer step."""
        self._monitor.write_events([(name, value, step) for name, value in scalars.items()])


class Reporter:
    """Progress on rank 0: a bar on a terminal, lines elsewhere, nothing on other ranks.

    Args:
        total: Optimizer steps of the run.
        done: Steps done before.
        style: `auto`, `bar`, `plain` or `none`.
    """

    def __init__(self, total: int, done: int, style: str) -> None:
        if dist.get_rank() != 0:
            style = "none"
        elif style == "auto":
            style = "bar" if sys.stdout.isatty() else "plain"
        self.style, self.total = style, total
        self._bar = None
        if style == "bar":
            columns = ["{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[status]}"))
            self._task = self._bar.add_task("train", total=total, completed=done, status="")
            self._bar.start()

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Shows loss, images/s and data wait."""
        status = (
            f"loss {scalars['loss/total']:.4f}  {scalars['perf/images_per_s']:.0f} img/s  "
            f"data wait {100 * scalars['perf/data_wait_share']:.0f}%"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        elif self.style == "plain":
            print(f"step {step}/{self.total}  {status}  lr {scalars['optim/lr']:.3g}", flush=True)

    def line(self, text: str) -> None:
        """One line of text."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.style == "plain":
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
