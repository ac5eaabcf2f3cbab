"""One run, put together: data index, processes, models, engine, and what watches over them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.checkpoint import checkpoint
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.cluster.heartbeat import Heartbeat
from scalekd_ds.cluster.preemption import Preemption
from scalekd_ds.config import RunConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.mix import Mixer
from scalekd_ds.data.sources.image_folder import ImageFolder, Source, check_same_classes, open_source, per_class, subset
from scalekd_ds.data.verify import without_quarantined
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.engine import build_engine, check_hostfile, job_store, seed_everything, start_processes
from scalekd_ds.engine.teacher_placement import held_bytes, place_teacher, planned_placement
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import normalisation_of
from scalekd_ds.student import Student, Taps
from scalekd_ds.teacher import Teacher
from scalekd_ds.training.ema import StudentEma, start_ema
from scalekd_ds.training.nonfinite import Nonfinite, skip_nonfinite
from scalekd_ds.training.run_dir import make_run_dir
from scalekd_ds.watching.monitor import Monitor


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
            train_mode=cfg.as_published.teacher_in_train_mode,
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
    saver: Saver
    heartbeat: Heartbeat
    preemption: Preemption
    nonfinite: Nonfinite
    step: int = 0
    cpu_seconds: float = 0.0
    grad_norm: torch.Tensor | None = None
    replica: nn.Module | None = None
    teacher_accuracy: dict[str, float] | None = None
    accuracy: dict[str, float] | None = None
    ema: StudentEma | None = None
    ema_accuracy: dict[str, float] | None = None
    # top1 and step of the best evaluation; wall seconds and joules of earlier starts
    best: dict[str, float] | None = None
    seconds_before: float = 0.0
    joules_before: float = 0.0
    # validation images for pictures, once they were read
    shown: torch.Tensor | None = None
    shows_pictures: bool = False

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

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's validation batches; each is a sign of life."""
        for batch in self.val_loader:
            self.heartbeat.progress()
            yield batch

    def accuracy_of(self, weights: Literal["student", "ema"]) -> dict[str, float] | None:
        return self.ema_accuracy if weights == "ema" else self.accuracy


def build(cfg: RunConfig) -> Run:
    """Everything up to the first step: data index, processes, models, engine, resume.

    Raises:
        UserError: Whatever the user can have got wrong, before any training.
    """
    check_hostfile()
    ds_json = ds_config.read(cfg.run.ds_config)
    run_dir = Path(cfg.run.dir)
    monitors = ds_config.monitors(ds_json, run_dir, cfg.run.monitors)
    resume_from = checkpoint.choose(run_dir, cfg.run.resume)
    train, val = read_sources(cfg)
    device = start_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ds_merged = ds_config.merge(ds_json, cfg, world_size)
    distiller = build_distiller(cfg, len(train.classes), verbose=rank == 0)
    if distiller.teacher is not None:
        prepare_teacher(distiller.teacher, cfg, ds_merged, len(train.classes), device)
    distiller.to(device)
    if cfg.student_sync_bn and world_size > 1:
        if device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(distiller.student)
        elif rank == 0:
            print("student_sync_bn does nothing on CPUs: each rank's BatchNorm sees its own images", flush=True)
    replica = copy.deepcopy(distiller.student) if ds_config.stage_of(ds_merged) == 3 else None
    steps_per_epoch = len(train) / cfg.global_batch_size
    total_steps = max(1, math.ceil(cfg.schedule.epochs * steps_per_epoch - 1e-9))
    engine = build_engine(distiller, cfg, ds_merged, steps_per_epoch, total_steps)
    skip_nonfinite(engine)
    # ranks draw different dropout and stochastic depth
    seed_everything(cfg.seed + rank)
    state = checkpoint.load(engine, resume_from) if resume_from else {}
    ema = start_ema(engine, cfg.ema.decay, resume_from)
    if rank == 0:
        checkpoint.write_json(make_run_dir(run_dir) / "config.json", cfg.as_dict())
        if resume_from and state["world_size"] != world_size:
            print(f"{resume_from.name} is of {state['world_size']} ranks, this run has {world_size}", flush=True)
        if resume_from:
            print(f"resuming {run_dir} from {resume_from.name}", flush=True)
        elif cfg.run.resume == "auto":
            print(f"{run_dir} holds no checkpoint yet: starting at step 0", flush=True)
    mean, std = normalisation_of(distiller.student)
    micro, _ = cfg.batches(world_size)
    mixer = Mixer(cfg.data, len(train.classes), micro, cfg.seed, rank) if cfg.mixes else None
    labels = train.labels if cfg.data.balanced else None
    batch = cfg.global_batch_size
    sampler = StreamSampler(len(train), cfg.seed, batch, micro, rank, world_size, cfg.data.repeats, labels)
    step = state.get("step", 0)
    store = job_store()
    heartbeat = Heartbeat(store, rank, world_size, run_dir / "stacks", cfg.run.rank_timeout, cfg.run.hang_timeout)
    return Run(
        cfg,
        device,
        engine,
        Monitor(monitors),
        train.classes,
        TrainLoader(train, cfg.data, sampler, device, mean, std, start_step=step),
        EvalLoader(val, cfg.data, cfg.data.eval_batch_size, rank, world_size, device, mean, std),
        mixer,
        total_steps,
        steps_per_epoch,
        Saver(run_dir, cfg.run.keep_last, cfg.run.keep_best, store),
        heartbeat,
        Preemption(heartbeat.hurry),
        Nonfinite(distiller, run_dir, cfg.run.max_skipped),
        step=step,
        cpu_seconds=state.get("cpu_seconds", 0.0),
        replica=replica,
        teacher_accuracy=state.get("teacher_accuracy"),
        accuracy=state.get("accuracy"),
        ema=ema,
        ema_accuracy=state.get("ema_accuracy"),
        best=state.get("best"),
        seconds_before=state.get("seconds", 0.0),
        joules_before=state.get("joules") or 0.0,
        shows_pictures=monitors.get("tensorboard", {}).get("enabled", False),
    )


def prepare_teacher(
    teacher: Teacher, cfg: RunConfig, ds_merged: dict[str, Any], num_classes: int, device: torch.device
) -> None:
    """Lowers, places and compiles the teacher as the run asks; collective."""
    dtype = ds_config.autocast_dtype(ds_merged)
    if dtype is not None:
        teacher.lower(dtype)
    placement = cfg.run.teacher_placement
    if placement == "auto":
        placement = planned_placement(teacher, cfg, ds_merged, num_classes, device)
    place_teacher(teacher, placement, device)
    if dist.get_rank() == 0 and placement != "replica":
        print(f"teacher: {placement}, {held_bytes(teacher) / 2**20:,.1f} MiB of its weights on rank 0", flush=True)
    if cfg.run.compile_teacher:
        teacher.compile()


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
