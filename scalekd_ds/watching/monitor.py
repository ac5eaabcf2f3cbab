"""What is kept of a run to look at: scalars through DeepSpeed's monitors, and pictures, text and hyperparameters in the
same TensorBoard file."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

# what runs are compared by
METRICS = ("val/best_top1", "val/top1", "loss/total")


class Monitor:
    """Writes on rank 0, and does nothing on others.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # engine.monitor would add DeepSpeed's own scalars, flushed at every step
        self._monitor = MonitorMaster(get_monitor_config(config))
        board = self._monitor.tb_monitor
        # DeepSpeed's own writer, so that one file holds everything
        self._writer = board.summary_writer if board is not None else None

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes `scalars` at an optimizer step, and all that was written before, to disk."""
        self._monitor.write_events([(name, value, step) for name, value in scalars.items()])

    def pictures(self, step: int, pictures: dict[str, torch.Tensor]) -> None:
        """Pictures (3, H, W) in 0 to 1, by name; on disk with the next scalars."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)

    def begin(self, step: int, text: str, hyperparameters: dict[str, bool | str | float]) -> None:
        """The run's summary, in Markdown, and its row in the table of runs."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("run/summary", text, step)
        # `add_hparams` would open a second file in a folder of its own, and so a second run
        experiment, start, self._end = hparams(hyperparameters, dict.fromkeys(METRICS, 0.0))
        for event in (experiment, start):
            self._writer.file_writer.add_summary(event)
        self._writer.flush()

    def end(self) -> None:
        """The run is finished: the table of runs says so."""
        if self._writer is not None:
            self._writer.file_writer.add_summary(self._end)
            self._writer.flush()
