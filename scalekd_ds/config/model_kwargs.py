"""Checks `student_kwargs` and `teacher_kwargs`: what a flag or the data decides is not given there a second time."""

from __future__ import annotations

from typing import Any

from scalekd_ds.errors import UserError

_COMMON = {
    "cache_dir": "set the variable HF_HUB_CACHE, which says where downloads are kept",
    "scriptable": "`scalekd export --format torchscript` makes a program of a student",
    "exportable": "`scalekd export` makes programs of a student",
    "no_jit": "timm has no scripted activations any more: leave it out",
    "device": "models are on the run's devices: leave it out",
    "dtype": "the DeepSpeed JSON (--run.ds_config) says what a run computes in: leave it out",
    "kwargs": "write its entries one level higher",
}
# argument -> what to do instead
_STUDENT = _COMMON | {
    **dict.fromkeys(("model", "model_name", "name", "architecture"), "give the name as --student"),
    **dict.fromkeys(
        ("pretrained", "weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
        "give the weights as --student_weights (pretrained, none or a file)",
    ),
    "num_classes": "it is the number of classes of the training images: leave it out",
    "image_size": "give the side of the images as --data.image_size",
    "input_size": "give the side of the images as --data.image_size",
    **dict.fromkeys(
        ("features_only", "out_indices", "feature_cls", "taps"),
        "its two feature maps are --student_taps, and it needs its classifier besides",
    ),
}
_TEACHER = _COMMON | {
    **dict.fromkeys(("model", "model_name", "name", "architecture"), "give the name as --teacher"),
    **dict.fromkeys(
        ("pretrained", "weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
        "give the weights as --teacher_weights (pretrained, none or a file)",
    ),
    **dict.fromkeys(("image_size", "input_size"), "give the side of its images as --teacher_image_size"),
    **dict.fromkeys(("features_only", "out_indices", "feature_cls"), "its tokens and its classifier are both needed"),
    "features": "whether its tokens are distilled is --distill.features",
    "train_mode": "the published code's oversight is --as_published.teacher_in_train_mode",
}


def check_model_kwargs(student: dict[str, Any], teacher: dict[str, Any], image_size: int) -> None:
    """Refuses constructor arguments that have a flag of their own or follow from the data.

    Args:
        student: `student_kwargs`.
        teacher: `teacher_kwargs`.
        image_size: `data.image_size`, the side of the student's images in pixels.

    Raises:
        UserError: Such an argument is given; the message names the flag.
    """
    for key, kwargs, refused in (("student_kwargs", student, _STUDENT), ("teacher_kwargs", teacher, _TEACHER)):
        for name, value in kwargs.items():
            if not name.isidentifier() or name in ("self", "args"):
                raise UserError(f"{key} has {name!r}, which is no argument of a model.")
            if name in refused:
                raise UserError(f"{key} has {name!r}: {refused[name]}.")
            # what timm is given as it is by default may be written out
            if name == "in_chans" and value != 3:
                raise UserError(f"{key}.in_chans is {value!r}: images have 3 channels, as grey ones are read too.")
            if name == "global_pool" and not value:
                raise UserError(f"{key}.global_pool is {value!r}: a classifier needs one vector an image.")
    sides = student.get("img_size", image_size)
    if sides not in (image_size, [image_size, image_size], (image_size, image_size)):
        raise UserError(
            f"student_kwargs.img_size is {sides!r} and data.image_size {image_size}: the student sees images of "
            "--data.image_size, for which it is built without this argument."
        )
    classes = teacher.get("num_classes", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise UserError(f"teacher_kwargs.num_classes is {classes!r}: it must be a number of classes, 0 for none.")
