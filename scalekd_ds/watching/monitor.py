"""Logs a run: scalars through DeepSpeed's monitors, and pictures, text and hyperparameters into the same TensorBoard file.

No run ends because a curve cannot be written: what fails is said once, and tried again at the next scalars.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from scalekd_ds.errors import cause_of

# the metrics in TensorBoard's table of runs
METRICS = ("val/best_top1", "val/top1", "loss/total")
NAMES = {"tb": "TensorBoard's file", "csv": "the .csv files", "wandb": "W&B", "comet": "Comet"}


class Monitor:
    """Writes the logs of a run on rank 0, and does nothing on other ranks.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._failed: set[str] = set()
        self._end: Any = None
        self._monitors: dict[str, Any] = {}
        _silence_tensorboards_thread()
        with self._not_essential("monitors"):
            # not engine.monitor, which would add DeepSpeed's own scalars and flush them at every step
            master = MonitorMaster(get_monitor_config(config))
            found = {name: getattr(master, f"{name}_monitor") for name in ("tb", "wandb", "csv", "comet")}
            self._monitors = {name: monitor for name, monitor in found.items() if monitor is not None}

    @property
    def _writer(self) -> Any:
        """The writer of DeepSpeed's TensorBoard monitor, so that everything is in one file; None without it."""
        board = self._monitors.get("tb")
        return board.summary_writer if board is not None and "tb" not in self._failed else None

    @contextlib.contextmanager
    def _not_essential(self, name: str) -> Iterator[None]:
        """A context whose errors are a warning, the first time; writers and services raise errors of many kinds."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                text = f"{NAMES.get(name, name)} cannot be written ({cause_of(error)}), and training goes on without"
                print(f"warning: {text}", file=sys.stderr, flush=True)
            self._failed.add(name)

    def _write(self, write: Callable[[Any], None]) -> None:
        """Calls `write` with TensorBoard's writer, where there is one that works."""
        if self._writer is not None:
            with self._not_essential("tb"):
                write(self._writer)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of an optimizer step, and flushes everything to disk."""
        for name, monitor in self._monitors.items():
            with self._not_essential(name):
                if name == "tb" and name in self._failed:
                    # its thread ended at the error; another file begins where the disk has room again
                    monitor.get_summary_writer()
                monitor.write_events([(key, value, step) for key, value in scalars.items()])
                self._failed.discard(name)

    def pictures(self, step: int, pictures: dict[str, torch.Tensor]) -> None:
        """Adds pictures (3, H, W) in 0 to 1, by name; they reach the disk with the next scalars."""
        for name, picture in pictures.items():
            self._write(lambda writer, name=name, picture=picture: writer.add_image(name, picture, step))

    def begin(self, step: int, text: str, hyperparameters: dict[str, bool | str | float]) -> None:
        """Writes the run's summary and its row in TensorBoard's table of runs.

        Args:
            step: The optimizer step at which training starts.
            text: The summary, in Markdown.
            hyperparameters: The values of the row.
        """

        def write(writer: Any) -> None:
            from torch.utils.tensorboard.summary import hparams

            writer.add_text("run/summary", text, step)
            # not `add_hparams`, which would write a second file in a folder of its own, and so show a second run
            experiment, start, self._end = hparams(hyperparameters, dict.fromkeys(METRICS, 0.0))
            for event in (experiment, start):
                writer.file_writer.add_summary(event)
            writer.flush()

        self._write(write)

    def end(self) -> None:
        """Marks the run as finished in the table of runs."""

        def write(writer: Any) -> None:
            if self._end is not None:
                writer.file_writer.add_summary(self._end)
            writer.flush()

        self._write(write)


def _silence_tensorboards_thread() -> None:
    """Keeps a thread of TensorBoard that a full disk ends from printing a traceback: the writer raises the same error."""
    shown = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        own = type(found.thread).__module__.startswith("tensorboard.")
        if not (own and isinstance(found.exc_value, OSError)):
            shown(found)

    threading.excepthook = hook
