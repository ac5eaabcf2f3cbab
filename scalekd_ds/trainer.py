"""The training run: build, resume, loop, evaluate, save."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds import checkpoint, ds_config
from scalekd_ds.card import student_card
from scalekd_ds.config import RunConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.mix import Mixer
from scalekd_ds.data.source import ImageFolder, Source, check_same_classes, open_source, per_class, subset
from scalekd_ds.data.verify import without_quarantined
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.ema import StudentEma, start_ema
from scalekd_ds.engine import (
    build_engine,
    check_hostfile,
    seed_everything,
    start_processes,
    student_state,
    synchronise_buffers,
)
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation import evaluate, evaluate_module
from scalekd_ds.models import normalisation_of
from scalekd_ds.monitor import Monitor, Reporter
from scalekd_ds.student import Student, Taps
from scalekd_ds.teacher import Teacher
from scalekd_ds.timing import StepTimer


def build_distiller(cfg: RunConfig, num_classes: int, verbose: bool) -> ScaleKD:
    """Student, teacher and projectors of a run, with the run's seed.

    Raises:
        UserError: Names, arguments or a pair that do not fit.
    """
    seed_everything(cfg.seed)
    size, d = cfg.data.image_size, cfg.distill
    teacher = None
    if cfg.teacher != "none":
        teacher = Teacher(
            cfg.teacher,
            cfg.teacher_image_size or size,
            cfg.teacher_weights,
            features=d.features,
            input_size=cfg.teacher_image_size,
            **cfg.teacher_kwargs,
        )
        # a teacher that is built must not shift the student's initialisation
        seed_everything(cfg.seed)
    taps = Taps(cfg.student_taps, False) if cfg.student_taps else None
    student = Student(cfg.student, num_classes, size, cfg.student_weights, taps, **cfg.student_kwargs)
    return ScaleKD(
        student,
        teacher,
        image_size=size,
        loss=cfg.loss,
        label_smoothing=cfg.label_smoothing,
        verbose=verbose,
        **vars(d),
    )


@dataclass
class Run:
    """Everything that the loop needs, and what it counts."""

    cfg: RunConfig
    device: torch.device
    engine: Any
    monitor: Monitor
    classes: list[str]
    train_loader: TrainLoader
    val_loader: EvalLoader
    mixer: Mixer | None
    total_steps: int
    steps_per_epoch: float
    step: int = 0
    cpu_seconds: float = 0.0
    grad_norm: torch.Tensor | None = None
    replica: nn.Module | None = None
    teacher_accuracy: dict[str, float] | None = None
    accuracy: dict[str, float] | None = None
    ema: StudentEma | None = None
    ema_accuracy: dict[str, float] | None = None

    @property
    def distiller(self) -> ScaleKD:
        return self.engine.module

    @property
    def teacher(self) -> Teacher | None:
        return self.distiller.teacher

    @property
    def ships(self) -> Literal["student", "ema"]:
        """Which weights student.safetensors gets, and whose accuracy is the run's."""
        return "ema" if self.ema is not None and self.cfg.ema.evaluate else "student"

    def accuracy_of(self, weights: Literal["student", "ema"]) -> dict[str, float] | None:
        return self.ema_accuracy if weights == "ema" else self.accuracy


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
        run.engine.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
    if run.ema is not None:
        run.ema.update()
    return {name: loss / accumulation for name, loss in sums.items()}


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
    if not math.isfinite(scalars["loss/total"]):
        raise FloatingPointError(f"non-finite loss at step {run.step}: {scalars}")
    scalars |= {f"weight/{name}": weight for name, weight in run.distiller.weights().items()}
    scalars["optim/lr"] = run.engine.get_lr()[0]
    norm = run.engine.get_global_grad_norm() if run.grad_norm is None else run.grad_norm
    if norm is not None:
        scalars["optim/grad_norm"] = float(norm)
    wall, shares = timer.read()
    scalars["perf/images_per_s"] = steps * run.cfg.global_batch_size / wall
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
    run.accuracy = evaluate_module(student_to_evaluate(run), run.val_loader, run.device)
    teacher = run.teacher
    if teacher is not None and run.teacher_accuracy is None and teacher.num_classes == len(run.classes):
        run.teacher_accuracy = evaluate(
            lambda images: run.distiller.teacher_targets(images).logits, run.val_loader, run.device
        )
    scalars = {"val/top1": run.accuracy["top1"], "val/top5": run.accuracy["top5"]}
    line = f"step {run.step}  val top-1 {run.accuracy['top1']:.2f}%  top-5 {run.accuracy['top5']:.2f}%"
    if run.ema is not None:
        run.ema_accuracy = evaluate_module(averaged_student(run), run.val_loader, run.device)
        scalars |= {f"val/ema_{k}": run.ema_accuracy[k] for k in ("top1", "top5")}
        line += f"  (average {run.ema_accuracy['top1']:.2f}%)"
    if run.teacher_accuracy:
        scalars |= {f"val/teacher_{k}": run.teacher_accuracy[k] for k in ("top1", "top5")}
        line += f"  (teacher {run.teacher_accuracy['top1']:.2f}%)"
    run.monitor.log(run.step, scalars)
    reporter.line(line)


def save(run: Run) -> Path:
    """A checkpoint of this step; collective."""
    state = {
        "step": run.step,
        "samples": run.step * run.cfg.global_batch_size,
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
        "cpu_seconds": run.cpu_seconds,
        "accuracy": run.accuracy,
        "ema_accuracy": run.ema_accuracy,
        "teacher_accuracy": run.teacher_accuracy,
        "config": run.cfg.as_dict(),
    }
    average = None if run.ema is None else (run.ema.state(), card_of(run, "ema"))
    return checkpoint.save(
        run.engine, Path(run.cfg.run.dir), state, card_of(run, "student"), run.cfg.run.keep_last, average
    )


def card_of(run: Run, weights: Literal["student", "ema"]) -> dict[str, Any]:
    """The card beside the student's own weights, or beside their average."""
    accuracy = run.accuracy_of(weights)
    return student_card(run.cfg, run.distiller, run.classes, run.step, accuracy, run.teacher_accuracy, weights)


def build(cfg: RunConfig) -> Run:
    """Everything up to the first step: data index, processes, models, engine, resume.

    Raises:
        UserError: Whatever the user can have got wrong, before any training.
    """
    check_hostfile()
    ds_json = ds_config.read(cfg.run.ds_config)
    run_dir = Path(cfg.run.dir)
    resume_from = checkpoint.choose(run_dir, cfg.run.resume)
    train, val = read_sources(cfg)
    device = start_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ds_merged = ds_config.merge(ds_json, cfg, world_size)
    distiller = build_distiller(cfg, len(train.classes), verbose=rank == 0).to(device)
    replica = copy.deepcopy(distiller.student) if ds_config.stage_of(ds_merged) == 3 else None
    steps_per_epoch = len(train) / cfg.global_batch_size
    total_steps = max(1, math.ceil(cfg.schedule.epochs * steps_per_epoch - 1e-9))
    engine = build_engine(distiller, cfg, ds_merged, steps_per_epoch, total_steps)
    if distiller.teacher is not None:
        if engine.torch_autocast_enabled():
            distiller.teacher.lower(engine.torch_autocast_dtype())
        if cfg.run.compile_teacher:
            distiller.teacher.compile()
    # ranks draw different dropout and stochastic depth
    seed_everything(cfg.seed + rank)
    state = checkpoint.load(engine, resume_from) if resume_from else {}
    ema = start_ema(engine, cfg.ema.decay, resume_from)
    if rank == 0:
        checkpoint.write_json(run_dir_made(run_dir) / "config.json", cfg.as_dict())
        if resume_from:
            print(f"resuming {run_dir} from {resume_from.name}", flush=True)
        elif cfg.run.resume == "auto":
            print(f"{run_dir} holds no checkpoint yet: starting at step 0", flush=True)
    mean, std = normalisation_of(distiller.student)
    micro, _ = cfg.batches(world_size)
    mixes = cfg.data.mixup > 0 or cfg.data.cutmix > 0
    mixer = Mixer(cfg.data, len(train.classes), micro, cfg.seed, rank) if mixes else None
    labels = train.labels if cfg.data.balanced else None
    batch = cfg.global_batch_size
    sampler = StreamSampler(len(train), cfg.seed, batch, micro, rank, world_size, cfg.data.repeats, labels)
    step = state.get("step", 0)
    return Run(
        cfg,
        device,
        engine,
        Monitor(ds_config.monitors(ds_json, run_dir)),
        train.classes,
        TrainLoader(train, cfg.data, sampler, device, mean, std, start_step=step),
        EvalLoader(val, cfg.data, cfg.data.eval_batch_size, rank, world_size, device, mean, std),
        mixer,
        total_steps,
        steps_per_epoch,
        step=step,
        cpu_seconds=state.get("cpu_seconds", 0.0),
        replica=replica,
        teacher_accuracy=state.get("teacher_accuracy"),
        accuracy=state.get("accuracy"),
        ema=ema,
        ema_accuracy=state.get("ema_accuracy"),
    )


def run_dir_made(run_dir: Path) -> Path:
    """The run's folder, there.

    Raises:
        UserError: It cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir is {str(run_dir)!r}, which cannot be made: {error}.") from None
    return run_dir


def read_sources(cfg: RunConfig) -> tuple[Source, Source]:
    """Index of the training images (the subset that the run uses) and of the validation images.

    Raises:
        UserError: A source that is missing, empty, or has other classes than its counterpart.
    """
    data = cfg.data
    if not data.root and not (data.train.startswith("hf:") and data.val.startswith("hf:")):
        raise UserError("data.root is not set: give the folder that holds train/ and val/ as --data.root DIR.")
    root = Path(data.root)

    def where(name: str) -> str | Path:
        return name if name.startswith("hf:") else root / name

    train = open_source(where(data.train), "data.train")
    # folders name their classes themselves; numbers mean in validation what they mean in training
    named = isinstance(train, ImageFolder) and (root / data.val).is_dir()
    val = open_source(where(data.val), "data.val", None if named else train.classes)
    check_same_classes(train, val)
    train, val = without_quarantined(train, root), without_quarantined(val, root)
    seed = cfg.seed if data.subset_seed is None else data.subset_seed
    if data.images_per_class is not None:
        train = per_class(train, data.images_per_class, seed)
    if data.train_images is not None:
        train = subset(train, data.train_images, seed)
    return train, val


def train(cfg: RunConfig) -> dict[str, Any]:
    """Runs `cfg` to its end, or to `run.stop_after`; returns what `results.json` holds."""
    run = build(cfg)
    last = min(run.total_steps, cfg.run.stop_after or run.total_steps)
    reporter = Reporter(last, run.step, cfg.run.progress)
    try:
        _loop(run, reporter, last)
    finally:
        reporter.close()
        run.train_loader.close()
    return _finish(run, reporter)


def _loop(run: Run, reporter: Reporter, last: int) -> None:
    cfg = run.cfg.run
    eval_steps = round(cfg.eval_every * run.steps_per_epoch)
    batches, timer = iter(run.train_loader), StepTimer(run.device)
    run.engine.train()
    logged, cpu = run.step, time.process_time()
    while run.step < last:
        losses = train_step(run, batches, timer)
        run.step += 1
        reporter.step(run.step)
        if run.step % cfg.log_every == 0 or run.step == last:
            scalars = scalars_of(run, losses, timer, run.step - logged)
            logged = run.step
            run.monitor.log(run.step, scalars)
            reporter.scalars(run.step, scalars)
        evaluating = (eval_steps and run.step % eval_steps == 0) or run.step == last
        saving = (cfg.save_every and run.step % cfg.save_every == 0) or run.step == last
        if not evaluating and not saving:
            continue
        # evaluation and saving are not training time
        run.cpu_seconds += time.process_time() - cpu
        if evaluating:
            validate(run, reporter)
        if saving:
            save(run)
        timer.reset()
        logged, cpu = run.step, time.process_time()


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
