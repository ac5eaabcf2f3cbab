"""What of a run's configuration a teacher cache depends on, and whether a run can be trained from one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, shell_word
from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.reader import TeacherCache

# fields that decide the pixels of a view, beside its seed and its number
_VIEW = (
    *(
        "image_size",
        "random_crop",
        "crop_scale",
        "crop_ratio",
        "interpolation",
        "hflip",
        "auto_augment",
        "color_jitter",
    ),
    *("random_erasing", "erasing_fill", "mixup", "cutmix", "mix_probability"),
)
_TEACHER = ("teacher", "teacher_kwargs", "teacher_weights", "teacher_image_size", "run.teacher_precision")
# mixing and its absence come to a run in two ways
_MIXING = ("data.mixup", "data.cutmix", "data.mix_probability")


def settings_of(cfg: RunConfig) -> dict[str, Any]:
    """The options, by name and as JSON has them, that a view or the teacher's answer to it depends on."""
    values = cfg.as_dict()
    found = {f"data.{name}": values["data"][name] for name in _VIEW}
    if not cfg.mixes:
        found |= dict.fromkeys(_MIXING[:2], 0.0)
    for name in _TEACHER:
        group, _, field = name.rpartition(".")
        found[name] = values[group][field] if group else values[field]
    return json.loads(json.dumps(found))


def views_of(manifest: Manifest) -> DataConfig:
    """The settings of a loader that makes the views of a cache, for loops without a `RunConfig`."""
    own = {name.removeprefix("data."): value for name, value in manifest.settings.items() if name.startswith("data.")}
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in own.items()}
    values["mix_by"] = "view" if values["mixup"] or values["cutmix"] else "batch"
    return DataConfig(**values, views=manifest.views, view_seed=manifest.view_seed)


def adopt(cfg: RunConfig, cache: TeacherCache) -> RunConfig:
    """The run as it is trained from a cache: with the cache's views, of which an epoch takes the next one.

    Args:
        cfg: The run.
        cache: The cache.

    Raises:
        UserError: The run asks for other views, another teacher, or targets that the cache does not hold.
    """
    manifest, where = cache.manifest, escape(cache.folder)
    asked = cfg.data
    if asked.views is not None and asked.views > manifest.views:
        raise UserError(
            f"--data.views is {asked.views}, and the teacher cache {where} has {manifest.views}: give --data.views "
            f"{manifest.views} or fewer, or make a cache with `scalekd cache --views {asked.views}`."
        )
    if asked.view_seed not in (None, manifest.view_seed):
        raise UserError(
            f"--data.view_seed is {asked.view_seed}, and the views of the teacher cache {where} have {manifest.view_seed}: "
            "leave --data.view_seed out (--seed changes all but the views), or make another cache."
        )
    if cfg.as_published.teacher_in_train_mode:
        raise UserError(
            "--as_published.teacher_in_train_mode is true, where the teacher's answers differ each time, and those of the "
            f"teacher cache {where} do not: set it to false, or leave --teacher_cache out."
        )
    _check_settings(manifest, cfg, where)
    _check_targets(manifest, cfg, where)
    data = dataclasses.replace(
        asked,
        views=asked.views or manifest.views,
        view_seed=manifest.view_seed,
        subset_seed=manifest.subset_seed if asked.subset_seed is None else asked.subset_seed,
        mix_by="view" if cfg.mixes else "batch",
    )
    return dataclasses.replace(cfg, data=data)


def _check_settings(manifest: Manifest, cfg: RunConfig, where: str) -> None:
    now = settings_of(cfg)
    for name, before in manifest.settings.items():
        value = now.get(name)
        if value == before or (name in ("teacher", "teacher_weights") and _is_file(before) and _is_file(value)):
            continue
        flag = f"--{name} {_word(before)}"
        raise UserError(
            f"--{name} is {_shown(value)}, and the teacher cache {where} was made with {_shown(before)}: give {flag}, or make "
            "another cache with `scalekd cache`."
        )


def _check_targets(manifest: Manifest, cfg: RunConfig, where: str) -> None:
    if cfg.distill.features and manifest.layout.tokens is None:
        raise UserError(
            f"--distill.features is true, and the teacher cache {where} holds logits only, since it was made with false: give "
            "--distill.features false, or make another cache."
        )
    if cfg.distill.needs_tokens_before:
        raise UserError(
            "--distill.tpp is false, which compares stage n-1 with the teacher's tokens before its last stage, and a teacher "
            f"cache ({where}) holds those after it: leave out --distill.tpp or --teacher_cache."
        )
    if cfg.distill.kd_weight > 0.0 and not manifest.layout.classes and manifest.teacher["num_classes"]:
        raise UserError(
            f"--distill.kd_weight is {cfg.distill.kd_weight:g}, and the teacher cache {where} holds no logits, since the "
            "teacher has other classes: give --distill.kd_weight 0, or make another cache."
        )


def check_images(manifest: Manifest, record: dict[str, Any], cfg: RunConfig) -> None:
    """Refuses images that are not those of a cache.

    Args:
        manifest: The cache's.
        record: What `images_record` says of the training images.
        cfg: The run.

    Raises:
        UserError: They differ.
    """
    before, where = manifest.data, escape(cfg.teacher_cache or "")
    if record["count"] != before["count"]:
        raise UserError(
            f"data.train has {record['count']:,} images, and the teacher cache {where} was made of {before['count']:,}: give "
            "the same --data.root, --data.train_images and --data.images_per_class, or make another cache."
        )
    for part, what in (("digest", "other names, labels or another order"), ("files", "other bytes in its files")):
        if record[part] != before[part]:
            raise UserError(
                f"data.train is not the set that the teacher cache {where} was made of: it has {what} (digest "
                f"{record[part][:12]}, and {before[part][:12]} there); give the same --data.root, --data.class_order and "
                "--data.subset_seed, or make another cache."
            )


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".safetensors", ".pth", ".pt", ".bin", ".npz"))


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) or value in (None, "") else str(value)


def _word(value: Any) -> str:
    return shell_word(_shown(value) if value != "" else "")
