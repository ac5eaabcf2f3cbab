"""Evaluations during a run: accuracies and pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.cluster.preemption import Preempted
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.compilation import eagerly
from scalekd_ds.engine.gather import student_state, synchronise_buffers
from scalekd_ds.evaluation.accuracy import evaluate, evaluate_module
from scalekd_ds.evaluation.left_out import check_left_out
from scalekd_ds.rng import rng_state, set_rng_state
from scalekd_ds.training.ema import StudentEma
from scalekd_ds.training.run import Run
from scalekd_ds.watching.run_pictures import draw_run_pictures, images_to_show
from scalekd_ds.watching.terminal import Reporter


def student_to_evaluate(run: Run) -> nn.Module:
    """The student with exactly the weights that a checkpoint saves; collective.

    Under ZeRO-3 with autocast DeepSpeed gathers the weights in bf16 for each forward pass. An unsharded copy then gets
    the float32 weights, so that the accuracy is that of the saved weights.
    """
    if run.unsharded_student is None:
        return run.distiller.student
    run.unsharded_student.load_state_dict(student_state(run.distiller))
    return run.unsharded_student


def averaged_student(run: Run, average: StudentEma) -> nn.Module:
    """An unsharded student that holds the moving average; collective.

    Below ZeRO-3 it is a copy that exists only during the evaluation, to leave its memory to training.
    """
    student = copy.deepcopy(run.distiller.student) if run.unsharded_student is None else run.unsharded_student
    student.load_state_dict(average.state())
    return student


def validate(run: Run, reporter: Reporter) -> None:
    """Measures top-1 and top-5 of the student and its average, and once of the teacher, and draws pictures; collective.

    The accuracies are stored in `run`, logged to the monitors and shown by `reporter`. Random generators are afterwards in
    the state that they were in before, so that a checkpoint of the same step resumes as the run goes on.

    Raises:
        LeftOutError: Too many validation images cannot be used; every rank raises it.
        Preempted: A signal asked the run to stop; the accuracies are those of the evaluation before.
    """
    before = run.accuracy, run.ema_accuracy, run.evaluated_step
    generators = rng_state()
    reporter.evaluating()
    try:
        with eagerly():
            _measure(run)
    except Preempted:
        run.accuracy, run.ema_accuracy, run.evaluated_step = before
        raise
    finally:
        set_rng_state(generators)
    top1, best = run.measured(run.shipped_weights)["top1"], run.best
    if best is None or top1 > best["top1"]:
        best = run.best = {"top1": top1, "step": run.step}
    # (prefix in TensorBoard, name in the table, accuracy)
    found = [("", "student", run.accuracy), ("ema_", "average", run.ema_accuracy)]
    found.append(("teacher_", "teacher", run.teacher_accuracy))
    shown = [(prefix, name, accuracy) for prefix, name, accuracy in found if accuracy]
    scalars = {f"val/{prefix}{key}": accuracy[key] for prefix, _, accuracy in shown for key in ("top1", "top5")}
    scalars |= {"val/best_top1": best["top1"], "data/bad_val_files": float(run.left_out)}
    run.monitor.log(run.step, scalars)
    rows = [{"name": n, "top1": a["top1"], "top5": a["top5"], "step": run.step} for _, n, a in shown]
    reporter.evaluation(run.step, [*rows, {"name": "best so far", "top5": None, **best}])


def _accuracy(run: Run, measure: Callable[[Iterator], dict[str, float]]) -> dict[str, float]:
    """What `measure` finds on the validation images, of which a few may be left out."""
    accuracy = measure(run.validation_batches())
    check_left_out(run.val_loader, accuracy, run.cfg.data.max_bad_share, "data.max_bad_share", run.left_out)
    run.left_out = int(accuracy["left_out"])
    return accuracy


def _teacher_logits(distiller: ScaleKD, images: torch.Tensor) -> torch.Tensor:
    logits = distiller.teacher_targets(images).logits
    if logits is None:
        raise RuntimeError("the teacher has no classifier")
    return logits


def _measure(run: Run) -> None:
    """Stores the accuracies in `run`, and draws pictures; collective."""
    synchronise_buffers(run.distiller)
    student = student_to_evaluate(run)
    run.accuracy = _accuracy(run, lambda batches: evaluate_module(student, batches, run.device))
    run.evaluated_step = run.step
    if run.cfg.run.pictures and run.logs_pictures:
        if run.picture_images is None:
            run.picture_images = images_to_show(run.val_loader, run.cfg.run.pictures, run.device)
        if len(run.picture_images):
            pictures = draw_run_pictures(run.distiller, student, run.picture_images)
            run.heartbeat.progress()
            if dist.get_rank() == 0:
                run.monitor.pictures(run.step, pictures)
    teacher = run.teacher
    # a headless one answers no images
    answers = (
        teacher is not None
        and not teacher.headless
        and teacher.num_classes == len(run.classes)
        and teacher.same_classes
    )
    if answers and run.teacher_accuracy is None:
        run.teacher_accuracy = _accuracy(
            run,
            lambda batches: evaluate(partial(_teacher_logits, run.distiller), batches, run.device),
        )
    if run.ema is not None:
        average = averaged_student(run, run.ema)
        run.ema_accuracy = _accuracy(run, lambda batches: evaluate_module(average, batches, run.device))
