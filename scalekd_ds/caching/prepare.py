"""Builds the teacher of a cache, and says in a manifest what the cache will be of."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist

from scalekd_ds import __version__
from scalekd_ds.build import build_answering
from scalekd_ds.caching.options import CacheOptions
from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.source import Source
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine import compilation, ds_config
from scalekd_ds.errors import UserError, say
from scalekd_ds.models.preprocessing import normalisation_of
from scalekd_ds.teacher import Teacher
from scalekd_ds.teacher_cache.headless import teacher_parts
from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.records import Layout
from scalekd_ds.teacher_cache.settings import settings_of
from scalekd_ds.teacher_cache.shards import shard_entries
from scalekd_ds.training.changes import images_record, package_versions, teacher_record
from scalekd_ds.training.setup import prepare_teacher
from scalekd_ds.training.teacher_precision import gate_notice, lower_teacher


class Built(NamedTuple):
    """What a cache is made with.

    Attributes:
        distiller: Has the teacher, and how it takes a student's images; without projectors.
        teacher: The teacher, still on the CPU and in float32.
        manifest: What the cache will be of.
        last_stage: The weights of the teacher's last stage.
    """

    distiller: ScaleKD
    teacher: Teacher
    manifest: Manifest
    last_stage: dict[str, torch.Tensor]


def with_views(cfg: RunConfig, options: CacheOptions) -> RunConfig:
    """The run with the views of its cache, whose mixing is that of views."""
    data = dataclasses.replace(
        cfg.data,
        views=options.views,
        view_seed=cfg.seed if cfg.data.view_seed is None else cfg.data.view_seed,
        mix_by="view" if cfg.mixes else "batch",
    )
    return dataclasses.replace(cfg, data=data)


def build(cfg: RunConfig, options: CacheOptions, train: Source) -> Built:
    """Builds the teacher of a cache.

    Args:
        cfg: The run, with its views.
        options: What is cached.
        train: The images.

    Raises:
        UserError: A model cannot be built, or the teacher has answers to none of what the run asks.
    """
    distiller = build_answering(cfg, len(train.classes), train.classes)
    teacher = distiller.teacher
    if teacher is None:
        raise UserError("--teacher is none, and a cache is of a teacher's answers: give one.")
    layout = _layout(teacher, len(train.classes), options)
    mean, std = normalisation_of(distiller.student)
    description, last_stage = teacher_parts(teacher)
    seed = cfg.seed if cfg.data.subset_seed is None else cfg.data.subset_seed
    manifest = Manifest(
        release=__version__,
        samples=len(train),
        views=options.views,
        view_seed=cfg.seed if cfg.data.view_seed is None else cfg.data.view_seed,
        order_seed=cfg.seed,
        subset_seed=seed,
        batch=cfg.micro_batch_size,
        shard_entries=shard_entries(len(train), cfg.micro_batch_size, layout.dtype.itemsize),
        layout=layout,
        settings=settings_of(cfg),
        mean=_three(mean),
        std=_three(std),
        data=images_record(train),
        teacher=description,
        digests=teacher_record(teacher),
        last_stage="",
        packages=package_versions(),
    )
    return Built(distiller, teacher, manifest, last_stage)


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _layout(teacher: Teacher, classes: int, options: CacheOptions) -> Layout:
    tokens = None
    if teacher.last_output is not None:
        (h, w), dim = teacher.last_output.grid, teacher.last_output.dim
        tokens = (h * w, dim)
    answers = teacher.num_classes == classes and teacher.same_classes
    if tokens is None and not answers:
        raise UserError(
            "the teacher has no logits for these classes, and --distill.features is false: there is nothing to cache."
        )
    held = options.logits != "all" and options.logits < classes
    top = options.logits if held and options.logits != "all" else None
    return Layout(tokens, options.store, classes if answers else 0, top if answers else None)


def place(built: Built, cfg: RunConfig, val: Source, classes: int, device: torch.device) -> dict[str, float]:
    """Takes the teacher to its device and its precision, as a run does; collective.

    Returns:
        What a lower precision has changed, as `lower_teacher` measures it.
    """
    world = dist.get_world_size()
    # the batch of an optimizer step, which a plan of the memory needs, is nobody's here
    alone = dataclasses.replace(cfg, global_batch_size=cfg.micro_batch_size * world)
    merged = ds_config.merge(ds_config.read(cfg.run.ds_config), alone, world)
    placement = prepare_teacher(built.teacher, alone, merged, classes, device)
    built.distiller.to(device)
    gate = lower_teacher(built.distiller, alone, val)
    say(gate_notice(gate, cfg.run))
    compiled = compilation.what_to_compile(cfg.run.compile, device.type, 0)
    if compiled != "off" and placement == "replica":
        built.teacher.compile(**compilation.options(cfg.run.deterministic))
    return gate
