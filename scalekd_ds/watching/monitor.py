"""Logs a run: scalars through DeepSpeed's monitors, and pictures, text and hyperparameters into the same TensorBoard file."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from scalekd_ds.errors import UserError, first_line
from scalekd_ds.names import one_line, utf8_path
from scalekd_ds.watching.continued_logs import continue_csv, continue_tensorboard

# the metrics in TensorBoard's table of runs
METRICS = ("val/best_top1", "val/top1", "loss/total")
# DeepSpeed's monitor, the package that it needs, and the cure where it does not start; first those that may need a login,
# so that nothing is written where they do
MONITORS: dict[str, tuple[type, str | None, str]] = {
    "wandb": (WandbMonitor, "wandb", "log in with `wandb login`, or set WANDB_MODE=offline"),
    "comet": (CometMonitor, "comet_ml", "set COMET_API_KEY"),
    "tensorboard": (TensorBoardMonitor, "tensorboard", "make its folder writable"),
    "csv_monitor": (csvMonitor, None, "make its folder writable"),
}
# monitors that write files, and need no service
FILES = ("tensorboard", "csv_monitor")


def _cannot_start(name: str, error: Exception, cure: str) -> str:
    shown = f"{type(error).__name__}: {first_line(error)}"
    return f"the monitor {name} cannot start ({shown}): {cure}, or name other monitors with --run.monitors."


class Monitor:
    """Writes the logs of a run on rank 0, and does nothing on other ranks.

    A service that fails later, because the network is gone, is given up with one warning, and training goes on. A file that
    cannot be written, because the disk is full, is tried again at the next scalars.

    Args:
        config: The monitors' part of the DeepSpeed JSON (`ds_config.monitors`).

    Raises:
        UserError: A monitor cannot start, on every rank.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # not engine.monitor, which would add DeepSpeed's own scalars and flush them at every step
        self._monitors: dict[str, Any] = {}
        self._failed: set[str] = set()
        self._end: Any = None
        problem = self._start(config) if dist.get_rank() == 0 else None
        if dist.get_world_size() > 1:
            told = [problem]
            torch.distributed.broadcast_object_list(told)
            (problem,) = told
        if problem is not None:
            raise UserError(problem)

    def _start(self, config: dict[str, Any]) -> str | None:
        """Starts each monitor; returns why one of them could not, or None."""
        try:
            settings = get_monitor_config(self._with_board_of_utf8(config))
        except OSError as error:
            return _cannot_start("tensorboard", error, MONITORS["tensorboard"][2])
        for name, (monitor, package, cure) in MONITORS.items():
            if not getattr(settings, name).enabled:
                continue
            try:
                if package is not None:
                    # DeepSpeed would print advice of its own where this fails
                    importlib.import_module(package)
                self._monitors[name] = monitor(getattr(settings, name))
            # the packages of services raise errors of their own, of many classes
            except Exception as error:
                return _cannot_start(name, error, cure)
        if "tensorboard" in self._monitors:
            _silence_writer_threads()
        return None

    @property
    def _writer(self) -> Any:
        """The writer of DeepSpeed's monitor, so that everything is in one file; None without TensorBoard."""
        board = self._monitors.get("tensorboard")
        return None if board is None or "tensorboard" in self._failed else board.summary_writer

    def _attempt(self, name: str, write: Callable[[], None]) -> None:
        """Writes to a monitor, and gives it up with a warning where it fails."""
        try:
            write()
            self._failed.discard(name)
        except Exception as error:
            # a disk may have room again; a service that is gone would be waited for at every step
            retried = name in FILES
            if name not in self._failed:
                then = "it is tried again at the next scalars" if retried else "it gets nothing more"
                shown = f"{type(error).__name__}: {first_line(error)}"
                message = f"warning: the monitor {name} failed ({shown}): {then}, and training goes on."
                print(one_line(message), file=sys.stderr, flush=True)
            self._failed.add(name)
            if not retried:
                del self._monitors[name]

    def _with_board_of_utf8(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings with a folder for TensorBoard that it takes: its file layer encodes each path as UTF-8."""
        board = config.get("tensorboard", {})
        if os.environ.get("RANK", "0") != "0" or not board.get("enabled") or not board.get("output_path"):
            return config
        os.makedirs(board["output_path"], exist_ok=True)
        self._alias = contextlib.ExitStack()
        path = self._alias.enter_context(utf8_path(board["output_path"]))
        return config | {"tensorboard": board | {"output_path": path}}

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of an optimizer step, and flushes everything to disk."""
        events = [(name, value, step) for name, value in scalars.items()]
        for name, monitor in list(self._monitors.items()):
            self._attempt(name, partial(self._log, name, monitor, events))

    def _log(self, name: str, monitor: Any, events: list[tuple[str, float, int]]) -> None:
        if name == "tensorboard" and name in self._failed:
            # its thread ended at the error, and takes nothing more: another file begins
            monitor.get_summary_writer()
        monitor.write_events(events)

    def pictures(self, step: int, pictures: dict[str, torch.Tensor]) -> None:
        """Adds pictures (3, H, W) in 0 to 1, by name; they reach the disk with the next scalars."""

        def write() -> None:
            for name, picture in pictures.items():
                self._writer.add_image(name, picture, step)

        if self._writer is not None:
            self._attempt("tensorboard", write)

    def begin(self, step: int, text: str, hyperparameters: dict[str, bool | str | float]) -> None:
        """Writes the run's summary and its row in TensorBoard's table of runs.

        What an earlier start has logged after `step` is taken back: its steps are trained again.

        Args:
            step: The optimizer step at which training starts.
            text: The summary, in Markdown.
            hyperparameters: The values of the row.
        """

        def write() -> None:
            from torch.utils.tensorboard.summary import hparams

            continue_tensorboard(self._writer, step)
            self._writer.add_text("run/summary", text, step)
            # not `add_hparams`, which would write a second file in a folder of its own, and so show a second run
            experiment, start, self._end = hparams(hyperparameters, dict.fromkeys(METRICS, 0.0))
            for event in (experiment, start):
                self._writer.file_writer.add_summary(event)
            self._writer.flush()

        if "csv_monitor" in self._monitors:
            self._attempt("csv_monitor", lambda: continue_csv(self._monitors["csv_monitor"], step))
        if self._writer is not None:
            self._attempt("tensorboard", write)

    def end(self) -> None:
        """Marks the run as finished in the table of runs."""

        def write() -> None:
            if self._end is not None:
                self._writer.file_writer.add_summary(self._end)
            self._writer.flush()

        if self._writer is not None:
            self._attempt("tensorboard", write)


def _silence_writer_threads() -> None:
    """Keeps TensorBoard's threads from printing a traceback where they fail: the next call raises the same error."""
    previous = threading.excepthook
    if getattr(previous, "without_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            previous(args)

    vars(hook)["without_tensorboard"] = True
    threading.excepthook = hook
