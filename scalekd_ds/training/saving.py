"""Saves a run: its checkpoints, and the student that it ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist

from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.checkpoint.save import save_checkpoint
from scalekd_ds.engine.gather import student_state
from scalekd_ds.errors import problem_of
from scalekd_ds.files.durable import write_json
from scalekd_ds.models.card import card_path
from scalekd_ds.training.run import Run
from scalekd_ds.training.student_card import student_card
from scalekd_ds.training.watch import Watch


def begin_checkpoint(run: Run, watch: Watch) -> Path:
    """Begins a checkpoint of the current step, and returns its folder; collective."""
    state = {
        "step": run.step,
        "samples": run.images,
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
        "cpu_seconds": run.cpu_seconds,
        **accuracies(run),
        "seconds": watch.seconds(),
        "joules": watch.joules(),
        "config": run.cfg.as_dict(),
        **run.record,
    }
    average = None if run.ema is None else (run.ema.state(is_kept=dist.get_rank() == 0), card_of(run, "ema"))
    return save_checkpoint(run.engine, run.saver, state, card_of(run, "student"), average)


def accuracies(run: Run) -> dict[str, Any]:
    """What is known of a run's accuracy, for the state of a checkpoint."""
    return {
        # the accuracy of the weights that the run ships, by which the best checkpoints are kept
        "top1": (run.accuracy_of(run.shipped_weights) or {}).get("top1"),
        "accuracy": run.accuracy,
        "evaluated_step": run.evaluated_step,
        "ema_accuracy": run.ema_accuracy,
        "teacher_accuracy": run.teacher_accuracy,
        "best": run.best,
        "measured_on": run.record.get("measured_on"),
    }


def card_of(run: Run, weights: Literal["student", "ema"]) -> dict[str, Any]:
    """The card of the student's own weights or of their average; it has no accuracy of another step's weights."""
    accuracy = run.accuracy_of(weights) if run.evaluated_step == run.step else None
    return student_card(run.cfg, run.distiller, run.classes, run.step, accuracy, run.teacher_accuracy, weights)


def ship(run: Run) -> str | None:
    """Writes student.safetensors with its card, and once it is written only the card again; collective.

    Returns:
        Why it could not be written, the same on every rank, or None.
    """
    file = Path(run.cfg.run.dir) / "student.safetensors"
    if run.shipped_step == run.step:
        return problem_of_rank_0(lambda: write_json(card_path(file), card_of(run, run.shipped_weights)))
    is_first = dist.get_rank() == 0
    if run.ema is not None and run.shipped_weights == "ema":
        weights = run.ema.state(is_first)
    else:
        weights = student_state(run.distiller, is_kept=is_first)
    problem = problem_of_rank_0(lambda: write_student(file, weights, card_of(run, run.shipped_weights)))
    run.shipped_step = None if problem else run.step
    return problem


def problem_of_rank_0(write: Callable[[], None]) -> str | None:
    """Rank 0 calls `write`; returns what is wrong with the disk, the same on every rank, or None; collective."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            problem = [problem_of(error)]
    if dist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(problem)
    return problem[0]
