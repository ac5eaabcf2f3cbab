"""Logs a run: scalars through DeepSpeed's monitors, and pictures, text and hyperparameters into the same TensorBoard file."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

# the metrics in TensorBoard's table of runs
METRICS = ("val/best_top1", "val/top1", "loss/total")


class Monitor:
    """Writes the logs of a run on rank 0, and does nothing on other ranks.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # not engine.monitor, which would add DeepSpeed's own scalars and flush them at every step
        self._monitor = MonitorMaster(get_monitor_config(config))
        board = self._monitor.tb_monitor
        # the writer of DeepSpeed's monitor, so that everything is in one file
        self._writer = board.summary_writer if board is not None else None

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of an optimizer step, and flushes everything to disk."""
        self._monitor.write_events([(name, value, step) for name, value in scalars.items()])

    def pictures(self, step: int, pictures: dict[str, torch.Tensor]) -> None:
        """Adds pictures (3, H, W) in 0 to 1, by name; they reach the disk with the next scalars."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)

    def begin(self, step: int, text: str, hyperparameters: dict[str, bool | str | float]) -> None:
        """Writes the run's summary and its row in TensorBoard's table of runs.

        Args:
            step: The optimizer step at which training starts.
            text: The summary, in Markdown.
            hyperparameters: The values of the row.
        """
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("run/summary", text, step)
        # not `add_hparams`, which would write a second file in a folder of its own, and so show a second run
        experiment, start, self._end = hparams(hyperparameters, dict.fromkeys(METRICS, 0.0))
        for event in (experiment, start):
            self._writer.file_writer.add_summary(event)
        self._writer.flush()

    def end(self) -> None:
        """Marks the run as finished in the table of runs."""
        if self._writer is not None:
            self._writer.file_writer.add_summary(self._end)
            self._writer.flush()
