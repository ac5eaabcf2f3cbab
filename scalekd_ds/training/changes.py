"""What has changed between the checkpoint that a run goes on from and the command that goes on.

Each difference is honoured with a line, honoured without one where the result does not depend on it, or refused where the
checkpoint cannot be continued so. What `config.json` records is what runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scalekd_ds.checkpoint.layout import WEIGHTS
from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.source import Source
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.models.card import card_path
from scalekd_ds.models.preprocessing import normalisation_of
from scalekd_ds.names import text_of
from scalekd_ds.teacher import Teacher

# fields that define what a checkpoint is of, and what to do instead
REFUSED = {
    **dict.fromkeys(("student", "student_kwargs", "student_taps"), "a checkpoint is of one student"),
    **dict.fromkeys(
        (
            *("distill.features", "distill.projector", "distill.norm", "distill.heads_s3", "distill.heads_s4"),
            "distill.tpp",
        ),
        "the projectors were trained with it",
    ),
    "optim.name": "its state is of one optimizer",
    "seed": "the order of the images follows from it",
}
# fields that the result does not depend on, or whose effect is compared by itself: the images, the teacher's weights
SILENT = {
    *("recipe", "teacher", "teacher_weights", "data.root", "data.train", "data.val", "data.class_order"),
    *("data.threads", "data.prefetch", "data.keep_mb", "data.hw_decoder_load", "data.largest_image", "data.augment_on"),
    *("data.eval_batch_size", "data.max_bad_share", "data.allow_missing_classes"),
}
# fields of `run`, which says where and how fast, that change what is learned
OF_THE_RUN = ("teacher_precision",)
# fields that nothing reads after the first step of a run
WITHOUT_EFFECT = {"student_weights": "the student's weights are those of the checkpoint"}
# keys of the merged DeepSpeed JSON that fields of the run fill in, which are compared themselves, and one of its log
FROM_THE_RUN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    "steps_per_print",
}
PACKAGES = ("torch", "deepspeed", "timm", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy", "scalekd-ds")


def package_versions() -> dict[str, str]:
    """Name -> version of the packages whose numbers a result may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flat_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RunConfig.as_dict` by their dotted names, as JSON has them; of `run` those in `OF_THE_RUN` alone."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config)).items():
        if name == "run":
            found |= {f"run.{key}": value[key] for key in OF_THE_RUN if key in value}
        elif isinstance(value, dict) and name in ("distill", "data", "optim", "ema", "schedule", "as_published"):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def config_changes(before: dict[str, Any], after: dict[str, Any], checkpoint: Path) -> list[str]:
    """One line for each field that has changed and matters.

    Args:
        before: `RunConfig.as_dict` of the run that wrote the checkpoint; fields that it lacks were added since.
        after: That of the run that goes on.
        checkpoint: Folder of the checkpoint, for messages.

    Raises:
        UserError: A field has changed that a checkpoint cannot be continued with.
    """
    old, new = flat_fields(before), flat_fields(after)
    changed = [name for name in new if name in old and old[name] != new[name]]
    for name in changed:
        if name in REFUSED and not (name == "student" and _are_files(old[name], new[name])):
            raise UserError(
                f"--{name} is {_shown(new[name])}, and was {_shown(old[name])} when {checkpoint.name} was written: "
                f"{REFUSED[name]}. Go on with the old value, or start a new run with --student_weights "
                f"{shlex.quote(str(checkpoint / WEIGHTS['student']))}."
            )
    if bool(new["teacher"] == "none") != bool(old.get("teacher", new["teacher"]) == "none"):
        raise UserError(
            f"--teacher is {new['teacher']}, and was {old['teacher']} when {checkpoint.name} was written: a run is "
            "distilled from its first step to its last, or not at all. Go on with the old value, or start a new run."
        )
    lines = [
        f"{name} is {_shown(new[name])} from here on, and was {_shown(old[name])}"
        for name in changed
        if name not in SILENT and name not in WITHOUT_EFFECT
    ]
    return lines + [f"{name} has no effect: {WITHOUT_EFFECT[name]}" for name in changed if name in WITHOUT_EFFECT]


def _are_files(*students: str) -> bool:
    """Whether all are files of weights, which may move: the card says what model they hold, whose layers are compared."""
    return all(name.endswith(".safetensors") for name in students)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) or value in (None, "") else str(value)


def images_change(before: dict[str, Any] | None, now: dict[str, Any], key: str) -> str | None:
    """How the images differ from those of the checkpoint, in one line, or None.

    Args:
        before: What `images_record` gave for the checkpoint, or None where it was not kept.
        now: What it gives now.
        key: Setting that names the images.
    """
    # a checkpoint of an earlier release lacks what was added since
    if before is None or all(now[name] == value for name, value in before.items()):
        return None
    if now["count"] != before["count"]:
        epochs = "; epochs are counted in the new number" if key == "data.train" else ""
        return f"{key} has {now['count']:,} images from here on, and had {before['count']:,}{epochs}"
    if now["digest"] != before["digest"]:
        return (
            f"{key} has as many images as when the checkpoint was written, but other ones, or under other names, with other "
            "labels or in another order"
        )
    return f"{key} has images under the names of when the checkpoint was written, but the files hold other bytes"


def images_record(source: Source) -> dict[str, Any]:
    """The number of images, a digest of their names below the source's root and their labels, and one of some files."""
    digest = hashlib.blake2b(source.labels.astype("<i8").tobytes(), digest_size=16)
    root = str(source.root)
    for first in range(0, len(source), 65536):
        names = (text_of(source.name(i).removeprefix(root)) for i in range(first, min(first + 65536, len(source))))
        digest.update("\0".join(names).encode(errors="surrogatepass"))
    # a set that was resized or encoded anew in its place shows in any few of its files
    files = hashlib.blake2b(digest_size=16)
    for i in range(0, len(source), max(1, len(source) // 16)):
        with contextlib.suppress(OSError):
            files.update(source.read(i).tobytes())
    return {"count": len(source), "digest": digest.hexdigest(), "files": files.hexdigest()}


# settings that an accuracy depends on, beside the validation images and the models' means
_MEASURED_WITH = ("data.image_size", "data.eval_resize", "data.interpolation", "teacher_image_size")


def measured_on(cfg: RunConfig, val: dict[str, Any], inputs: dict[str, Any]) -> str:
    """A digest of what accuracies are measured on: those of two digests cannot be compared.

    Args:
        cfg: The run.
        val: `images_record` of the validation images.
        inputs: `model_inputs` of the run.
    """
    fields = flat_fields(cfg.as_dict())
    parts = [val, inputs, *(fields[name] for name in _MEASURED_WITH)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def model_inputs(distiller: ScaleKD) -> dict[str, Any]:
    """The mean and the deviation that the images of student and teacher are normalised with, as JSON has them."""
    models = {"student": distiller.student, "teacher": distiller.teacher and distiller.teacher.model}
    return {
        name: dict(zip(("mean", "std"), map(list, normalisation_of(model)), strict=True))
        for name, model in models.items()
        if model is not None
    }


def input_changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """One line for each model whose images are normalised otherwise than before: its card has changed, or its library."""
    return [
        f"the {name}'s images are normalised with {_shown(now[name])} from here on, and were with {_shown(old)}"
        for name, old in (before or {}).items()
        if name in now and now[name] != old
    ]


def engine_changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """One line for each setting of the DeepSpeed JSON that has changed.

    Args:
        before: The merged JSON of the run that wrote the checkpoint, or None where it was not kept.
        now: That of the run that goes on.
    """

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if not prefix and key in FROM_THE_RUN:
                continue
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value
        return found

    if before is None:
        return []
    old, new = flat(before), flat(json.loads(json.dumps(now)))
    return [
        f"DeepSpeed's {key} is {_shown(new.get(key))} from here on, and was {_shown(old.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def version_changes(before: dict[str, str] | None) -> str | None:
    """Which packages have another version than when the checkpoint was written, in one line, or None."""
    now = package_versions()
    found = [
        f"{name} {now[name]} (was {version})" if name in now else f"{name} is not installed (was {version})"
        for name, version in (before or {}).items()
        if now.get(name) != version
    ]
    return f"packages have changed since the checkpoint: {', '.join(found)}" if found else None


def classes_of(checkpoint: Path) -> list[str] | None:
    """The names of a checkpoint's classes in their order, or None where its card has none."""
    try:
        names = json.loads(card_path(checkpoint / WEIGHTS["student"]).read_text(encoding="utf-8")).get("classes")
    except (OSError, ValueError):
        return None
    return [str(name) for name in names] if names else None


def weights_digest(tensors: Iterable[torch.Tensor]) -> str:
    """A digest of tensors, of some thousands of values of each, which take milliseconds."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 16384)].float().cpu().contiguous()
        digest.update(str(tuple(tensor.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def teacher_record(teacher: Teacher | None) -> dict[str, str | None]:
    """Digests of a teacher's parameters, and of its statistics, which are BatchNorm's."""
    if teacher is None:
        return {"teacher_digest": None}
    statistics = [value for name, value in teacher.model.state_dict().items() if name.endswith(("_mean", "_var"))]
    return {
        "teacher_digest": weights_digest(teacher.model.parameters()),
        "teacher_statistics": weights_digest(statistics),
    }


def check_teacher(before: dict[str, Any], now: dict[str, str | None], old: dict[str, Any], cfg: RunConfig) -> None:
    """Refuses a teacher with other weights than that of the checkpoint, wherever its file lies.

    Args:
        before: The state of the checkpoint, which may lack what was added since.
        now: `teacher_record` of the run that goes on.
        old: `RunConfig.as_dict` of the run that wrote the checkpoint.
        cfg: The run that goes on.

    Raises:
        UserError: The two differ.
    """
    if None in now.values() or all(before.get(name) in (None, digest) for name, digest in now.items()):
        return
    raise UserError(
        f"the teacher's weights are not those that the checkpoint was trained with (--teacher {cfg.teacher} "
        f"--teacher_weights {cfg.teacher_weights}; they were {old['teacher']} and {old['teacher_weights']}): give those, or "
        "start a new run with --student_weights."
    )
