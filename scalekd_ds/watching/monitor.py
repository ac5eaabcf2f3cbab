"""Logs a run: scalars through DeepSpeed's monitors, and pictures, text and hyperparameters into the same TensorBoard file."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from scalekd_ds.durable_files import write_json, write_text

# the metrics in TensorBoard's table of runs
METRICS = ("val/best_top1", "val/top1", "loss/total")


class Monitor:
    """Writes the logs of a run on rank 0, and does nothing on other ranks.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).
        run_dir: The run's folder.
    """

    def __init__(self, config: dict[str, Any], run_dir: Path) -> None:
        if config.get("wandb", {}).get("enabled"):
            _continue_wandb(run_dir)
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

        What an earlier start has logged after `step` is taken back: its steps are trained again.

        Args:
            step: The optimizer step at which training starts.
            text: The summary, in Markdown.
            hyperparameters: The values of the row.
        """
        if self._monitor.csv_monitor is not None and self._monitor.csv_monitor.enabled:
            _continue_csv(self._monitor.csv_monitor, step)
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard.summary import hparams

        # as SummaryWriter(purge_step=...) does, which DeepSpeed's monitor does not pass on
        for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
            self._writer.file_writer.add_event(event, step + 1)
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


def _continue_csv(monitor: Any, step: int) -> None:
    """Cuts what earlier starts wrote after `step`, and writes no second header below it."""
    for path in Path(monitor.log_dir).glob("*.csv"):
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        # a kill may have cut the last row, and DeepSpeed wrote a header at every start
        kept = [row for row in rows if row.endswith("\n") and row.split(",")[0].isdecimal()]
        write_text(path, "".join([header, *(row for row in kept if int(row.split(",")[0]) <= step)]))
        if header:
            monitor.filenames.append(path.stem)


def _continue_wandb(run_dir: Path) -> None:
    """Gives wandb the run's own id, with which a resumed run goes on as the same one; rank 0 alone logs to it."""
    if dist.get_rank() != 0 or "WANDB_RUN_ID" in os.environ:
        return
    path = run_dir / "wandb_id.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    os.environ["WANDB_RUN_ID"] = json.loads(path.read_text())["id"]
    os.environ.setdefault("WANDB_RESUME", "allow")
