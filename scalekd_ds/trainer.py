"""The training loop: steps, scalars, evaluation, checkpoints, and a clean end, whatever ends it."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds import checkpoint
from scalekd_ds.card import student_card
from scalekd_ds.config import RunConfig
from scalekd_ds.engine import student_state, synchronise_buffers
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation import evaluate, evaluate_module
from scalekd_ds.monitor import Reporter
from scalekd_ds.nonfinite import statistics
from scalekd_ds.run import Run, build
from scalekd_ds.timing import StepTimer
from scalekd_ds.zero_layout import shards_of


def train_step(run: Run, batches: Any, timer: StepTimer) -> dict[str, torch.Tensor]:
    """One optimizer step; returns the mean losses of its micro batches, still on the device."""
    sums: dict[str, torch.Tensor] = {}
    accumulation = run.engine.gradient_accumulation_steps()
    for micro in range(accumulation):
        with timer.part("data_wait", host=True):
            images, labels = next(batches)
        if run.mixer is not None:
            images, labels = run.mixer(images, labels, run.step, micro)
        targets = None
        if run.teacher is not None:
            with timer.part("teacher"):
                targets = run.distiller.teacher_targets(images)
        losses = run.engine(images, labels, targets)
        run.engine.backward(losses["loss/total"])
        if run.engine.is_gradient_accumulation_boundary():
            run.grad_norm = own_grad_norm(run.engine)
            # the last checkpoint's copies are of the weights before this update
            run.saver.copied()
        run.engine.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
    if run.ema is not None:
        run.ema.update()
    means = {name: loss / accumulation for name, loss in sums.items()}
    run.nonfinite.step_done(run.engine.was_step_applied(), lambda: report_of(run, images, means))
    return means


def report_of(run: Run, images: torch.Tensor, losses: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What is known of a step that was skipped: this rank's samples, and statistics of its tensors."""
    sampler = run.train_loader.sampler
    micro_batches = [sampler.indices(run.step, micro)[0].tolist() for micro in range(sampler.accumulation)]
    masters = [(f"weights {number}", shard.flat) for number, shard in enumerate(shards_of(run.engine))]
    return {
        "rank": dist.get_rank(),
        "step": run.step,
        "samples": {i: run.train_loader.source.name(i) for batch in micro_batches for i in batch},
        "tensors": statistics([("images of the last micro batch", images), *losses.items(), *masters]),
    }


def own_grad_norm(engine: Any) -> torch.Tensor | None:
    """Norm of the averaged gradients, before they are clipped, where DeepSpeed reports none: without ZeRO."""
    if engine.zero_optimization_stage() > 0:
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def mean_over_ranks(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """One all-reduce and one host sync; a NaN on any rank is a NaN on every rank."""
    means = torch.stack([loss.float() for loss in losses.values()]) / dist.get_world_size()
    dist.all_reduce(means)
    return dict(zip(losses, means.tolist(), strict=True))


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Collective."""
    total = torch.tensor(float(value), device=device)
    dist.all_reduce(total)
    return total.item()


def scalars_of(run: Run, losses: dict[str, torch.Tensor], timer: StepTimer, steps: int) -> dict[str, float]:
    """Everything that TensorBoard gets at a logged step."""
    scalars = mean_over_ranks(losses)
    scalars |= {f"weight/{name}": weight for name, weight in run.distiller.weights().items()}
    scalars["optim/lr"] = run.engine.get_lr()[0]
    norm = run.engine.get_global_grad_norm() if run.grad_norm is None else run.grad_norm
    if norm is not None:
        scalars["optim/grad_norm"] = float(norm)
    wall, shares = timer.read()
    scalars["perf/images_per_s"] = steps * run.cfg.global_batch_size / wall
    scalars["optim/skipped_steps"] = float(run.engine.skipped_steps)
    scalars["data/bad_files"] = sum_over_ranks(len(run.train_loader.bad_files), run.device)
    scalars["perf/data_wait_share"] = shares.get("data_wait", 0.0)
    if run.teacher is not None:
        scalars["perf/teacher_share"] = shares.get("teacher", 0.0)
    scalars["progress/epoch"] = run.step / run.steps_per_epoch
    return scalars


def student_to_evaluate(run: Run) -> nn.Module:
    """The student with the weights that are saved and shipped; collective.

    Under ZeRO-3 with autocast DeepSpeed gathers weights in bf16 for each forward pass: an unsharded copy gets the
    float32 ones, so that what is measured is what is consolidated.
    """
    if run.replica is None:
        return run.distiller.student
    run.replica.load_state_dict(student_state(run.distiller))
    return run.replica


def averaged_student(run: Run) -> nn.Module:
    """An unsharded student that holds the moving average; collective.

    Below ZeRO-3 it lives for this evaluation alone, so that training has the memory of a whole copy.
    """
    student = copy.deepcopy(run.distiller.student) if run.replica is None else run.replica
    student.load_state_dict(run.ema.state())
    return student


def validate(run: Run, reporter: Reporter) -> None:
    """Top-1 and top-5 of the student and its average, and once of the teacher; collective."""
    synchronise_buffers(run.distiller)
    run.accuracy = evaluate_module(student_to_evaluate(run), run.validation(), run.device)
    teacher = run.teacher
    if teacher is not None and run.teacher_accuracy is None and teacher.num_classes == len(run.classes):
        run.teacher_accuracy = evaluate(
            lambda images: run.distiller.teacher_targets(images).logits, run.validation(), run.device
        )
    scalars = {"val/top1": run.accuracy["top1"], "val/top5": run.accuracy["top5"]}
    line = f"step {run.step}  val top-1 {run.accuracy['top1']:.2f}%  top-5 {run.accuracy['top5']:.2f}%"
    if run.ema is not None:
        run.ema_accuracy = evaluate_module(averaged_student(run), run.validation(), run.device)
        scalars |= {f"val/ema_{k}": run.ema_accuracy[k] for k in ("top1", "top5")}
        line += f"  (average {run.ema_accuracy['top1']:.2f}%)"
    if run.teacher_accuracy:
        scalars |= {f"val/teacher_{k}": run.teacher_accuracy[k] for k in ("top1", "top5")}
        line += f"  (teacher {run.teacher_accuracy['top1']:.2f}%)"
    run.monitor.log(run.step, scalars)
    reporter.line(line)


def save(run: Run) -> Path:
    """Begins a checkpoint of this step; collective."""
    state = {
        "step": run.step,
        "samples": run.step * run.cfg.global_batch_size,
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
        "cpu_seconds": run.cpu_seconds,
        # of what the run ships: by it the best checkpoints are kept
        "top1": (run.accuracy_of(run.ships) or {}).get("top1"),
        "accuracy": run.accuracy,
        "ema_accuracy": run.ema_accuracy,
        "teacher_accuracy": run.teacher_accuracy,
        "config": run.cfg.as_dict(),
    }
    average = None if run.ema is None else (run.ema.state(), card_of(run, "ema"))
    return checkpoint.save(run.engine, run.saver, state, card_of(run, "student"), average)


def card_of(run: Run, weights: Literal["student", "ema"]) -> dict[str, Any]:
    """The card beside the student's own weights, or beside their average."""
    accuracy = run.accuracy_of(weights)
    return student_card(run.cfg, run.distiller, run.classes, run.step, accuracy, run.teacher_accuracy, weights)


def train(cfg: RunConfig) -> dict[str, Any]:
    """Runs `cfg` to its end, to `run.stop_after`, or to a signal that asks it to stop.

    Returns:
        What `results.json` holds; after a signal only `step`, `total_steps` and `stopped_by`.

    Raises:
        UserError: While training: what the user can mend.
        RankLostError: Another rank failed, died, or cannot be reached.
    """
    run = build(cfg)
    last = min(run.total_steps, cfg.run.stop_after or run.total_steps)
    reporter = Reporter(last, run.step, cfg.run.progress)
    with run.heartbeat, run.preemption:
        try:
            finished = _loop(run, reporter, last)
            results = _finish(run, reporter) if finished else _stop(run, reporter)
            run.saver.finish()
        except UserError:
            raise
        # a collective whose peer has gone fails with an error of the transport, which names no rank
        except RuntimeError as error:
            run.heartbeat.raise_if_lost(error)
            raise
        finally:
            reporter.close()
            run.train_loader.close()
    return results


def _loop(run: Run, reporter: Reporter, last: int) -> bool:
    """Trains to step `last`; False where a signal ended it before, with the checkpoint of that step begun."""
    cfg = run.cfg.run
    eval_steps = round(cfg.eval_every * run.steps_per_epoch)
    batches, timer = iter(run.train_loader), StepTimer(run.device)
    run.engine.train()
    logged, cpu = run.step, time.process_time()
    while run.step < last:
        losses = train_step(run, batches, timer)
        run.step += 1
        run.heartbeat.progress(run.step)
        reporter.step(run.step)
        if run.step % cfg.log_every == 0 or run.step == last:
            scalars = scalars_of(run, losses, timer, run.step - logged)
            logged = run.step
            run.monitor.log(run.step, scalars)
            reporter.scalars(run.step, scalars)
        stopping = run.preemption.stop() and run.step < last
        evaluating = not stopping and ((eval_steps and run.step % eval_steps == 0) or run.step == last)
        saving = stopping or (cfg.save_every and run.step % cfg.save_every == 0) or run.step == last
        if not evaluating and not saving:
            continue
        # evaluation and saving are not training time
        run.cpu_seconds += time.process_time() - cpu
        if evaluating:
            validate(run, reporter)
        if saving:
            save(run)
        if stopping:
            return False
        run.heartbeat.progress(run.step)
        timer.reset()
        logged, cpu = run.step, time.process_time()
    return True


def _stop(run: Run, reporter: Reporter) -> dict[str, Any]:
    """After a signal: the checkpoint is finished, and the user told how to go on."""
    run.saver.finish()
    reporter.line(
        f"stopped at step {run.step} of {run.total_steps}, as a signal asked ({run.preemption.signal or 'on another rank'}); "
        f"the same command with --run.resume auto goes on from it in {run.cfg.run.dir}"
    )
    return {"step": run.step, "total_steps": run.total_steps, "stopped_by": run.preemption.signal}


def _finish(run: Run, reporter: Reporter) -> dict[str, Any]:
    run_dir = Path(run.cfg.run.dir)
    weights = run.ema.state() if run.ships == "ema" else student_state(run.distiller)
    shipped = run.accuracy_of(run.ships)
    results = {
        "step": run.step,
        "total_steps": run.total_steps,
        "weights": run.ships,
        "top1": shipped["top1"],
        "top5": shipped["top5"],
        "student_top1": run.accuracy["top1"],
        "ema_top1": (run.ema_accuracy or {}).get("top1"),
        "teacher_top1": (run.teacher_accuracy or {}).get("top1"),
        "cpu_seconds": run.cpu_seconds,
        "world_size": dist.get_world_size(),
    }
    if dist.get_rank() == 0:
        checkpoint.write_student(run_dir / "student.safetensors", weights, card_of(run, run.ships))
        checkpoint.write_json(run_dir / "results.json", results)
        reporter.line(
            f"top-1 {results['top1']:.2f}% after {run.step} steps; weights: {run_dir / 'student.safetensors'}"
        )
    dist.barrier()
    return results
