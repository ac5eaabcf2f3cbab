"""Sets a run up: data, processes, models, engine, checkpoint, and what supervises them."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from scalekd_ds.build import build_distiller
from scalekd_ds.checkpoint.layout import checkpoints_of, read_state
from scalekd_ds.checkpoint.load import choose_checkpoint, leave_later, load_checkpoint
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.cluster.heartbeat import Heartbeat
from scalekd_ds.cluster.launcher import check_hostfile
from scalekd_ds.cluster.preemption import Preemption
from scalekd_ds.cluster.ranks import join_ranks
from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.mix import Mixer
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.data.sources.source import Source
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine import compilation, ds_config
from scalekd_ds.engine.cpu_precision import missing_gpu_notice, slow_precision_notice
from scalekd_ds.engine.determinism import choose_algorithms
from scalekd_ds.engine.processes import job_store, start_processes
from scalekd_ds.engine.teacher_placement import held_bytes, place_teacher
from scalekd_ds.engine.time_limits import lift_time_limits, nccl_error
from scalekd_ds.errors import UserError, say
from scalekd_ds.models.preprocessing import cut_off_notice, normalisation_of
from scalekd_ds.names import escape
from scalekd_ds.rng import seed_everything
from scalekd_ds.teacher import Teacher
from scalekd_ds.teacher_cache.headless import headless_teacher
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.settings import adopt, check_images
from scalekd_ds.training.build_engine import build_engine
from scalekd_ds.training.cache_gate import compare_with_run
from scalekd_ds.training.changes import (
    check_teacher,
    classes_of,
    config_changes,
    engine_changes,
    images_change,
    images_record,
    input_changes,
    measured_on,
    model_inputs,
    package_versions,
    teacher_record,
    version_changes,
)
from scalekd_ds.training.ema import slow_average_notice, start_ema
from scalekd_ds.training.micro_batch import micro_batch_notice
from scalekd_ds.training.nonfinite import NonfiniteGuard, skip_nonfinite
from scalekd_ds.training.planned_placement import planned_placement
from scalekd_ds.training.run import Run
from scalekd_ds.training.run_dir import check_room, write_config
from scalekd_ds.training.teacher_precision import gate_notice, lower_teacher
from scalekd_ds.watching.continued_logs import continue_wandb
from scalekd_ds.watching.monitor import Monitor


def build(cfg: RunConfig, supervised: ExitStack | None = None) -> Run:
    """Opens the data, joins the processes, builds models and engine, and loads the checkpoint of a run; collective.

    Args:
        cfg: The run.
        supervised: Gets the run's heartbeat, which watches from the meeting of the ranks on; None starts none.

    Raises:
        UserError: A setting, the data, the weights, the DeepSpeed JSON or the checkpoint cannot be used.
    """
    check_hostfile()
    join_ranks()
    cache = TeacherCache(cfg.teacher_cache, cfg.data.max_bad_share) if cfg.teacher_cache is not None else None
    if cache is not None:
        cfg = adopt(cfg, cache)
    ds_json = ds_config.read(cfg.run.ds_config)
    run_dir = Path(cfg.run.dir)
    monitors = ds_config.monitors(ds_json, run_dir, cfg.run.monitors)
    resume_from = choose_checkpoint(run_dir, cfg.run.resume)
    state = read_state(resume_from) if resume_from else {}
    is_elsewhere = resume_from is not None and resume_from not in checkpoints_of(run_dir)
    if resume_from is not None and "config" in state:
        for line in config_changes(state["config"], cfg.as_dict(), resume_from):
            say(line)
    train, val = read_sources(cfg, classes_of(resume_from) if resume_from else None)
    device = start_processes()
    choose_algorithms(cfg.run.deterministic, device.type)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = job_store()
    limits = cfg.run.rank_timeout, cfg.run.hang_timeout
    heartbeat = Heartbeat(store, rank, world_size, run_dir / "stacks", *limits, nccl_error)
    if supervised is not None:
        supervised.enter_context(heartbeat)
        lift_time_limits()
    ds_merged = ds_config.merge(ds_json, cfg, world_size)
    ds_config.check_memory(ds_merged, device, cfg.run.ds_config)
    compiled = compilation.what_to_compile(cfg.run.compile, device.type, ds_config.stage_of(ds_merged))
    if cfg.run.compile_teacher is not None:
        say(f"run.compile_teacher is an old name: --run.compile is {cfg.run.compile} (off, teacher or all)")
    if device.type == "cpu" and rank == 0:
        dtype = ds_config.autocast_dtype(ds_merged)
        say(missing_gpu_notice(dtype))
        say(slow_precision_notice(dtype, cfg.run.ds_config))
    # the student's weights are those of the checkpoint, wherever the file is that it once began with
    begun = dataclasses.replace(cfg, student_weights="none") if resume_from else cfg
    shows = rank == 0 and cfg.run.progress not in ("quiet", "none")
    last_stage = headless_teacher(cache.manifest.teacher, cache.last_stage()) if cache is not None else None
    distiller = build_distiller(begun, len(train.classes), shows, train.classes, last_stage)
    record = _record(cfg, distiller, ds_merged, train, val, state, cache)
    if cache is not None and rank == 0:
        say(compare_with_run(cfg, cache, train, device))
    if state.get("measured_on", record["measured_on"]) != record["measured_on"]:
        say(
            "accuracies before were measured on other images, or otherwise: they are measured anew, and so is the best one"
        )
        state |= dict.fromkeys(("accuracy", "evaluated_step", "ema_accuracy", "teacher_accuracy", "best"))
    placement: TeacherPlacement = "replica"
    if distiller.teacher is not None:
        placement = prepare_teacher(distiller.teacher, cfg, ds_merged, len(train.classes), device)
    distiller.to(device)
    gate = lower_teacher(distiller, cfg, val)
    say(gate_notice(gate, cfg.run))
    if distiller.teacher is not None and compiled != "off" and (placement == "replica" or cfg.run.compile != "auto"):
        distiller.teacher.compile(**compilation.options(cfg.run.deterministic))
    if cfg.student_sync_bn and world_size > 1:
        if device.type != "cpu":
            distiller.tapped_student.synchronise_batchnorm()
        elif rank == 0:
            print("student_sync_bn does nothing on CPUs: each rank's BatchNorm sees its own images", flush=True)
    say(cut_off_notice(distiller.student, cfg.data.image_size))
    say(micro_batch_notice(cfg, world_size, distiller))
    if compiled != "off" and cfg.run.compile == "auto":
        say(compilation.try_teacher(distiller, cfg.batches(world_size)[0]))
    unsharded_student = copy.deepcopy(distiller.student) if ds_config.stage_of(ds_merged) == 3 else None
    steps_per_epoch = len(train) / cfg.global_batch_size
    step, batch = state.get("step", 0), cfg.global_batch_size
    images_before = state.get("samples", step * batch) - step * batch
    steps_before = images_before / batch
    total_steps = max(1, math.ceil(cfg.schedule.epochs * steps_per_epoch - steps_before - 1e-9))
    engine = build_engine(distiller, cfg, ds_merged, steps_per_epoch, total_steps, steps_before)
    skip_nonfinite(engine)
    if compiled == "all":
        # after the engine and BatchNorm over ranks have changed modules
        distiller.compile(**compilation.options(cfg.run.deterministic))
    # each rank has another seed, so that dropout and stochastic depth differ
    seed_everything(cfg.seed + rank)
    if resume_from:
        load_checkpoint(engine, resume_from)
    ema = start_ema(engine, cfg.ema.decay, resume_from)
    if rank == 0:
        say(slow_average_notice(cfg.ema.decay, total_steps))
        write_config(run_dir, cfg)
        check_room(run_dir, _bytes_to_save(distiller, cfg, ema is not None))
        if resume_from:
            say(leave_later(run_dir, resume_from))
        if resume_from and state["world_size"] != world_size:
            print(f"{resume_from.name} is of {state['world_size']} ranks, this run has {world_size}", flush=True)
        if resume_from:
            print(f"resuming {escape(run_dir)} from {resume_from.name}", flush=True)
        elif cfg.run.resume == "auto":
            print(f"{escape(run_dir)} holds no checkpoint yet: starting at step 0", flush=True)
    mean, std = normalisation_of(distiller.student)
    micro, _ = cfg.batches(world_size)
    # by view the loader mixes itself
    data = cfg.data if cfg.mixes else dataclasses.replace(cfg.data, mixup=0.0, cutmix=0.0)
    mixer = Mixer(data, len(train.classes), micro, cfg.seed, rank) if cfg.mixes and data.mix_by == "batch" else None
    labels = train.labels if cfg.data.balanced else None
    sampler = StreamSampler(
        len(train),
        cfg.seed,
        batch,
        micro,
        rank,
        world_size,
        data.repeats,
        labels,
        images_before,
        data.views,
        data.view_seed,
    )
    # views from a cache are those that the teacher has seen; a student of another normalisation gets them in its own
    made = (mean, std) if cache is None else (cache.manifest.mean, cache.manifest.std)
    seen = None if (tuple(mean), tuple(std)) == tuple(map(tuple, made)) else (mean, std)
    if rank == 0 and monitors.get("wandb", {}).get("enabled"):
        continue_wandb(run_dir)
    return Run(
        cfg,
        device,
        engine,
        Monitor(monitors),
        train.classes,
        TrainLoader(train, data, sampler, device, *made, start_step=step, cached=cache, seen=seen),
        EvalLoader(val, cfg.data, cfg.data.eval_batch_size, rank, world_size, device, mean, std),
        mixer,
        total_steps,
        steps_per_epoch,
        Saver(run_dir, cfg.run.keep_last, cfg.run.keep_best, store),
        heartbeat,
        Preemption(heartbeat.shorten_timeout),
        NonfiniteGuard(distiller, run_dir, cfg.run.max_skipped),
        step=step,
        images_before=images_before,
        record=record,
        cpu_seconds=state.get("cpu_seconds", 0.0),
        unsharded_student=unsharded_student,
        teacher_accuracy=state.get("teacher_accuracy"),
        accuracy=state.get("accuracy"),
        evaluated_step=state.get("evaluated_step"),
        ema=ema,
        ema_accuracy=state.get("ema_accuracy"),
        best=state.get("best"),
        gate=gate,
        seconds_before=state.get("seconds", 0.0),
        joules_before=state.get("joules") or 0.0,
        is_elsewhere=is_elsewhere,
        cache=cache,
        logs_pictures=monitors.get("tensorboard", {}).get("enabled", False),
    )


def _bytes_to_save(distiller: ScaleKD, cfg: RunConfig, averages: bool) -> int:
    """Bytes of a checkpoint and of the student's file, without what is small."""
    # ZeRO-3 leaves a rank a part of each parameter
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in distiller.parameters() if p.requires_grad}
    states = 8 if cfg.optim.name != "sgd" else 4 if cfg.optim.momentum else 0
    student = sum(sizes.get(p, 0) * p.element_size() for p in distiller.student.parameters())
    return sum(n * (p.element_size() + states) for p, n in sizes.items()) + student * (3 if averages else 2)


def _record(
    cfg: RunConfig,
    distiller: ScaleKD,
    ds_merged: dict[str, Any],
    train: Source,
    val: Source,
    state: dict[str, Any],
    cache: TeacherCache | None,
) -> dict[str, Any]:
    """What checkpoints say of data, teacher, engine and packages, and what of it has changed since the checkpoint `state`.

    Raises:
        UserError: The teacher's weights are not those of the checkpoint, or the images are not those of the teacher cache.
    """
    record: dict[str, Any] = dict(teacher_record(distiller.teacher) if cache is None else cache.manifest.digests)
    check_teacher(state, record, state.get("config", {}), cfg)
    inputs = model_inputs(distiller)
    record |= {"inputs": inputs, "packages": package_versions(), "ds_config": ds_merged}
    for line in input_changes(state.get("inputs"), inputs):
        say(line)
    for line in engine_changes(state.get("ds_config"), ds_merged):
        say(line)
    say(version_changes(state.get("packages")))
    if dist.get_rank() == 0:
        for key, source in (("data.train", train), ("data.val", val)):
            record[key] = images_record(source)
            say(images_change(state.get(key), record[key], key))
        if cache is not None:
            check_images(cache.manifest, record["data.train"], cfg)
        record["measured_on"] = measured_on(cfg, record["data.val"], inputs)
    # all ranks evaluate, or none
    shared = [record.get("measured_on")]
    if dist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(shared)
    return record | {"measured_on": shared[0]}


def prepare_teacher(
    teacher: Teacher, cfg: RunConfig, ds_merged: dict[str, Any], num_classes: int, device: torch.device
) -> TeacherPlacement:
    """Converts the teacher to the compute dtype of the run and places it, as the run asks; collective.

    Returns:
        Where it is.

    Raises:
        UserError: Its precision is not the run's own, and its weights do not fit on one device.
    """
    dtype, precision = ds_config.autocast_dtype(ds_merged), cfg.run.teacher_precision
    if precision == "fp32":
        teacher.hold_in(torch.float32)
    elif dtype is not None:
        teacher.lower_precision(dtype)
    asked = cfg.run.teacher_placement
    placement = planned_placement(teacher, cfg, ds_merged, num_classes, device) if asked == "auto" else asked
    if precision in ("bf16", "fp8") and placement != "replica" and not teacher.headless:
        raise UserError(
            f"run.teacher_precision is {precision} and the teacher is {placement}: its answers are compared with those of "
            "the whole teacher; set --run.teacher_precision autocast or --run.teacher_placement replica."
        )
    place_teacher(teacher, placement, device)
    if dist.get_rank() == 0 and placement != "replica":
        print(f"teacher: {placement}, {held_bytes(teacher) / 2**20:,.1f} MiB of its weights on rank 0", flush=True)
    return placement
