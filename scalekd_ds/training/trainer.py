"""The training loop: steps, scalars, evaluations, checkpoints, and a clean end of every kind."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from deepspeed import comm as dist

from scalekd_ds.checkpoint.layout import WEIGHTS
from scalekd_ds.cluster.launcher import check_hostfile
from scalekd_ds.cluster.preemption import Preempted
from scalekd_ds.cluster.ranks import join_ranks
from scalekd_ds.config import RunConfig
from scalekd_ds.engine.time_limits import lift_time_limits
from scalekd_ds.errors import UserError, cure_of
from scalekd_ds.evaluation.left_out import LeftOutError
from scalekd_ds.files.durable import write_json
from scalekd_ds.process import signals
from scalekd_ds.training.report_card import report_card
from scalekd_ds.training.run import Run
from scalekd_ds.training.run_dir import check_apart, held_run_dir, set_results_aside
from scalekd_ds.training.saving import accuracies, begin_checkpoint, card_of, problem_of_rank_0, ship
from scalekd_ds.training.setup import build
from scalekd_ds.training.start_lines import start_lines
from scalekd_ds.training.step import train_step
from scalekd_ds.training.student_card import MEASURED
from scalekd_ds.training.validation import validate
from scalekd_ds.training.watch import Watch
from scalekd_ds.watching.provenance import hyperparameters, summary
from scalekd_ds.watching.terminal import Reporter, reporter_for
from scalekd_ds.watching.terminal.json_lines import claim_stdout


def evaluate_and_note(run: Run, reporter: Reporter, watch: Watch, saved: bool) -> None:
    """Evaluates, and adds the accuracies to the checkpoint of this step; collective.

    Args:
        run: The run.
        reporter: Shows the accuracies.
        watch: The clock of the run.
        saved: Whether a checkpoint of this step was begun.

    Raises:
        LeftOutError: Too many validation images cannot be used; the weights are in a checkpoint.
    """
    try:
        validate(run, reporter)
    except LeftOutError as error:
        # what was trained outlives the data that it cannot be measured on
        if not saved:
            begin_checkpoint(run, watch)
        run.saver.finish()
        raise LeftOutError(
            f"{error} What was trained is in {run.saver.folder / f'step{run.step:08d}'}; --run.resume auto goes on from it."
        ) from None
    names: tuple[Literal["student", "ema"], ...] = ("student", "ema") if run.ema is not None else ("student",)
    cards = {WEIGHTS[name]: {key: card_of(run, name)[key] for key in MEASURED} for name in names}
    spent = {"seconds": watch.seconds(), "joules": watch.joules()}
    run.saver.note_evaluation(run.step, {"state": accuracies(run) | spent, "cards": cards})


def train(cfg: RunConfig) -> dict[str, Any]:
    """Trains to the end of the run, to `run.stop_after`, or until a signal asks it to stop; collective.

    Args:
        cfg: The run.

    Returns:
        The contents of `results.json`; after a signal only `step`, `total_steps` and `stopped_by`.

    Raises:
        UserError: The user has to change something: a setting, the data, or the disk.
        RankLostError: Another rank failed, died, or cannot be reached.
    """
    if cfg.run.progress == "json":
        claim_stdout()
    check_hostfile()
    join_ranks()
    check_apart(cfg)
    with held_run_dir(Path(cfg.run.dir)), ExitStack() as supervised:
        return _train(build(cfg, supervised))


def _train(run: Run) -> dict[str, Any]:
    """Trains a run that is built, and whose heartbeat watches; as `train`."""
    cfg = run.cfg
    # with those of the groups that the engine and the preemption have made
    lift_time_limits()
    last = min(run.total_steps, cfg.run.stop_after or run.total_steps)
    if dist.get_rank() == 0:
        if run.step < last:
            set_results_aside(Path(cfg.run.dir))
        text = summary(cfg, run.distiller.pairing(), dist.get_world_size(), run.device)
        run.monitor.begin(run.step, text, hyperparameters(cfg))
        if run.gate:
            run.monitor.log(run.step, run.gate)
    reporter = reporter_for(cfg.run.progress, dist.get_rank(), last, run.step)
    reporter.begin(start_lines(run))
    signals.outcome("the last checkpoint is intact, and --run.resume auto goes on from it")
    with run.preemption, Watch(run) as watch:
        try:
            try:
                if run.is_elsewhere and run.step >= last:
                    # no step will save one, without which the next start would begin anew
                    begin_checkpoint(run, watch)
                _loop(run, reporter, watch, last)
                results = _finish(run, reporter, watch)
            except Preempted:
                results = _stop(run, reporter)
            run.saver.finish(Path(cfg.run.dir) / "student.safetensors" if run.shipped_step == run.step else None)
        except UserError:
            raise
        # here, where a signal does not end the process before it has said which rank is lost
        except RuntimeError as error:
            run.heartbeat.raise_if_lost(error)
            raise
        finally:
            reporter.close()
            run.train_loader.close()
    return results


def _loop(run: Run, reporter: Reporter, watch: Watch, last: int) -> None:
    """Trains to step `last`.

    Raises:
        Preempted: A signal asked the run to stop; a checkpoint of the last step is begun.
    """
    cfg = run.cfg.run
    if 0 < run.step < last and evaluation_is_due(run) and run.evaluated_step != run.step:
        # the start before ended between the checkpoint and its evaluation
        evaluate_and_note(run, reporter, watch, saved=True)
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
        stopping = run.preemption.stop()
        evaluating = evaluation_is_due(run) or run.step == last
        saving = (cfg.save_every and run.step % cfg.save_every == 0) or run.step == last
        if not (evaluating or saving or stopping):
            continue
        # evaluation and saving are not training time
        run.cpu_seconds += time.process_time() - cpu
        # what was trained is saved first: an evaluation may fail for reasons of its own
        if saving or stopping:
            begin_checkpoint(run, watch)
        if stopping:
            raise Preempted
        if run.step == last:
            ship(run)
        if evaluating:
            try:
                evaluate_and_note(run, reporter, watch, saving)
            except Preempted:
                # an evaluation may take longer than a scheduler waits; it is repeated when the run goes on
                if not saving:
                    begin_checkpoint(run, watch)
                raise
        run.heartbeat.progress(run.step)
        watch.reset()
        cpu = time.process_time()


def evaluation_is_due(run: Run) -> bool:
    """Whether the last step has reached the next multiple of `run.eval_every` epochs; an interval below a step is each step.

    Counted in images: an interval that was rounded to steps would drift, and drop evaluations of a long run.
    """
    if not run.cfg.run.eval_every:
        return False
    interval, batch = run.cfg.run.eval_every * run.steps_per_epoch, run.cfg.global_batch_size
    if interval <= 1.0:
        return True
    before, after = ((run.images - batch * back) / batch / interval for back in (1, 0))
    # a multiple that is reached but for rounding is reached
    return math.floor(after + 1e-9) > math.floor(before + 1e-9)


def _stop(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Ends a run after a signal: waits for the checkpoint, and tells the user how to resume."""
    run.saver.finish()
    # what to do is the last line, below the bar
    reporter.close()
    reporter.line(
        f"stopped at step {run.step} of {run.total_steps} ({run.preemption.signal or 'a signal to another rank'}); the same "
        f"command with --run.resume auto goes on "
        f"from it in {run.cfg.run.dir}"
    )
    return {"step": run.step, "total_steps": run.total_steps, "stopped_by": run.preemption.signal}


def _finish(run: Run, reporter: Reporter, watch: Watch) -> dict[str, Any]:
    """Ends a complete run: writes weights, card and results, and shows the report; collective."""
    run_dir = Path(run.cfg.run.dir)
    if run.evaluated_step != run.step:
        # a run that goes on with fewer epochs than it has behind it takes no step
        reporter.line(f"nothing is left to train after step {run.step}")
        evaluate_and_note(run, reporter, watch, saved=True)
    problem = ship(run)
    shipped = run.measured(run.shipped_weights)
    results = {
        "step": run.step,
        "total_steps": run.total_steps,
        "images": run.images,
        "weights": run.shipped_weights,
        "top1": shipped["top1"],
        "top5": shipped["top5"],
        # a checkpoint of an older release does not have them
        "val_images": shipped.get("images"),
        "val_images_left_out": shipped.get("left_out", 0),
        "best": run.best,
        "student_top1": run.measured("student")["top1"],
        "ema_top1": (run.ema_accuracy or {}).get("top1"),
        "teacher_top1": (run.teacher_accuracy or {}).get("top1"),
        "seconds": watch.seconds(),
        "joules": watch.joules(),
        "cpu_seconds": run.cpu_seconds,
        "world_size": dist.get_world_size(),
    }
    problem = problem or problem_of_rank_0(lambda: write_json(run_dir / "results.json", results))
    if problem:
        run.saver.finish()
        kept = run.saver.folder / f"step{run.step:08d}"
        raise UserError(
            f"the results could not be written ({problem}): {cure_of(problem)}. What was trained is in {kept}: "
            f"`scalekd consolidate {shlex.quote(str(kept))} OUT.safetensors` writes its weights anywhere, and --run.resume "
            "auto ends the run."
        )
    if dist.get_rank() == 0:
        run.monitor.end()
        reporter.card(report_card(run.cfg, results, len(run.classes)))
    dist.barrier()
    return results
