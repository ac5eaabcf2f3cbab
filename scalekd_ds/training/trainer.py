"""The training loop: steps, scalars, evaluation, checkpoints, and a clean end, whatever ends it."""

from __future__ import annotations

import copy
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.checkpoint import checkpoint
from scalekd_ds.config import RunConfig
from scalekd_ds.engine.engine import student_state, synchronise_buffers
from scalekd_ds.engine.zero_layout import shards_of
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation.accuracy import evaluate, evaluate_module
from scalekd_ds.models.card import student_card
from scalekd_ds.recipes.imagenet import published_baseline
from scalekd_ds.training.nonfinite import statistics
from scalekd_ds.training.run import Run, build
from scalekd_ds.training.watch import Watch
from scalekd_ds.watching.provenance import hyperparameters, summary
from scalekd_ds.watching.run_pictures import draw, images_to_show
from scalekd_ds.watching.terminal import Quiet, reporter_for
from scalekd_ds.watching.terminal.json_lines import claim_stdout
from scalekd_ds.watching.terminal.report import ReportCard


def train_step(run: Run, batches: Any) -> dict[str, torch.Tensor]:
    """One optimizer step; returns the mean losses of its micro batches, still on the device."""
    part = run.distiller.part
    sums: dict[str, torch.Tensor] = {}
    accumulation = run.engine.gradient_accumulation_steps()
    for micro in range(accumulation):
        with part("data_wait"):
            images, labels = next(batches)
        if run.mixer is not None:
            images, labels = run.mixer(images, labels, run.step, micro)
        targets = None
        if run.teacher is not None:
            with part("teacher"):
                targets = run.distiller.teacher_targets(images)
        losses = run.engine(images, labels, targets)
        with part("backward"):
            run.engine.backward(losses["loss/total"])
        if run.engine.is_gradient_accumulation_boundary():
            run.grad_norm = own_grad_norm(run.engine)
            # the last checkpoint's copies are of the weights before this update
            run.saver.copied()
        with part("optimizer"):
            run.engine.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
    if run.ema is not None:
        with part("optimizer"):
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


def validate(run: Run, reporter: Quiet) -> None:
    """Top-1 and top-5 of the student and its average, and once of the teacher, and pictures; collective."""
    synchronise_buffers(run.distiller)
    student = student_to_evaluate(run)
    run.accuracy = evaluate_module(student, run.validation(), run.device)
    if run.cfg.run.pictures and run.shows_pictures:
        if run.shown is None:
            run.shown = images_to_show(run, run.cfg.run.pictures)
        pictures = draw(run, student, run.shown)
        run.heartbeat.progress()
        if dist.get_rank() == 0:
            run.monitor.pictures(run.step, pictures)
    teacher = run.teacher
    if teacher is not None and run.teacher_accuracy is None and teacher.num_classes == len(run.classes):
        run.teacher_accuracy = evaluate(
            lambda images: run.distiller.teacher_targets(images).logits, run.validation(), run.device
        )
    if run.ema is not None:
        run.ema_accuracy = evaluate_module(averaged_student(run), run.validation(), run.device)
    top1 = run.accuracy_of(run.ships)["top1"]
    if run.best is None or top1 > run.best["top1"]:
        run.best = {"top1": top1, "step": run.step}
    # as TensorBoard and as the table name them
    found = [("", "student", run.accuracy), ("ema_", "average", run.ema_accuracy)]
    found.append(("teacher_", "teacher", run.teacher_accuracy))
    found = [(prefix, name, accuracy) for prefix, name, accuracy in found if accuracy]
    scalars = {f"val/{prefix}{key}": accuracy[key] for prefix, _, accuracy in found for key in ("top1", "top5")}
    run.monitor.log(run.step, scalars | {"val/best_top1": run.best["top1"]})
    rows = [{"name": n, "top1": a["top1"], "top5": a["top5"], "step": run.step} for _, n, a in found]
    reporter.evaluation(run.step, [*rows, {"name": "best so far", "top5": None, **run.best}])


def save(run: Run, watch: Watch) -> Path:
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
        "best": run.best,
        "seconds": watch.seconds(),
        "joules": watch.joules(),
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
    if cfg.run.progress == "json":
        claim_stdout()
    run = build(cfg)
    last = min(run.total_steps, cfg.run.stop_after or run.total_steps)
    if dist.get_rank() == 0:
        text = summary(cfg, run.distiller.pairing(), dist.get_world_size(), run.device)
        run.monitor.begin(run.step, text, hyperparameters(cfg))
    reporter = reporter_for(cfg.run.progress, dist.get_rank(), last, run.step)
    with run.heartbeat, run.preemption, Watch(run) as watch:
        try:
            finished = _loop(run, reporter, watch, last)
            results = _finish(run, reporter, watch) if finished else _stop(run, reporter)
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


def _loop(run: Run, reporter: Quiet, watch: Watch, last: int) -> bool:
    """Trains to step `last`; False where a signal ended it before, with the checkpoint of that step begun."""
    cfg = run.cfg.run
    eval_steps = round(cfg.eval_every * run.steps_per_epoch)
    batches = iter(run.train_loader)
    run.engine.train()
    watch.reset()
    cpu = time.process_time()
    while run.step < last:
        logged = (run.step + 1) % cfg.log_every == 0 or run.step + 1 == last
        watch.expect(logged)
        losses = train_step(run, batches)
        run.step += 1
        run.heartbeat.progress(run.step)
        reporter.step(run.step)
        if logged:
            scalars = watch.scalars(losses)
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
            save(run, watch)
        if stopping:
            return False
        run.heartbeat.progress(run.step)
        watch.reset()
        cpu = time.process_time()
    return True


def _stop(run: Run, reporter: Quiet) -> dict[str, Any]:
    """After a signal: the checkpoint is finished, and the user told how to go on."""
    run.saver.finish()
    reporter.line(
        f"stopped at step {run.step} of {run.total_steps}, as a signal asked ({run.preemption.signal or 'on another rank'}); "
        f"the same command with --run.resume auto goes on from it in {run.cfg.run.dir}"
    )
    return {"step": run.step, "total_steps": run.total_steps, "stopped_by": run.preemption.signal}


def _finish(run: Run, reporter: Quiet, watch: Watch) -> dict[str, Any]:
    run_dir = Path(run.cfg.run.dir)
    weights = run.ema.state() if run.ships == "ema" else student_state(run.distiller)
    shipped = run.accuracy_of(run.ships)
    results = {
        "step": run.step,
        "total_steps": run.total_steps,
        "weights": run.ships,
        "top1": shipped["top1"],
        "top5": shipped["top5"],
        "best": run.best,
        "student_top1": run.accuracy["top1"],
        "ema_top1": (run.ema_accuracy or {}).get("top1"),
        "teacher_top1": (run.teacher_accuracy or {}).get("top1"),
        "seconds": watch.seconds(),
        "joules": watch.joules(),
        "cpu_seconds": run.cpu_seconds,
        "world_size": dist.get_world_size(),
    }
    if dist.get_rank() == 0:
        checkpoint.write_student(run_dir / "student.safetensors", weights, card_of(run, run.ships))
        checkpoint.write_json(run_dir / "results.json", results)
        run.monitor.end()
        reporter.card(report_card(run.cfg, results, len(run.classes)))
    dist.barrier()
    return results


def report_card(cfg: RunConfig, results: dict[str, Any], num_classes: int) -> ReportCard:
    """What the end of a run shows."""
    run_dir = Path(cfg.run.dir)
    weights = run_dir / "student.safetensors"
    files = {"weights": weights, "results": run_dir / "results.json", "checkpoints": run_dir / "checkpoints"}
    commands = [
        ["scalekd", "evaluate", str(weights), "--data", cfg.data.root],
        ["tensorboard", "--logdir", cfg.run.dir],
    ]
    baseline = cfg.run.baseline_top1
    if baseline is None:
        baseline = published_baseline(cfg.recipe, num_classes)
    return ReportCard(
        top1=results["top1"],
        best_top1=results["best"]["top1"],
        best_step=results["best"]["step"],
        weights=results["weights"],
        baseline_top1=baseline,
        teacher_top1=results["teacher_top1"],
        steps=results["step"],
        seconds=results["seconds"],
        images=results["step"] * cfg.global_batch_size,
        joules=results["joules"],
        files={name: str(path) for name, path in files.items()},
        next=[shlex.join(command) for command in commands],
    )
