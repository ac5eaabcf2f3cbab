"""Teacher and student pairs by a short name, in the shapes of the published recipes, with random weights."""

from __future__ import annotations

from scalekd_ds.config import DataConfig, DistillConfig, OptimConfig, RunConfig
from scalekd_ds.recipes import RECIPES

_SWIN = DistillConfig(heads_s3=16, heads_s4=24, softmax_scale=5.0)
_BEIT = DistillConfig(heads_s3=8, heads_s4=8, softmax_scale=1.0, weights_s3=(0.016, 0.008), weights_s4=(0.016, 0.008))
_LAMB = OptimConfig("lamb", lr=5e-3, weight_decay=0.02)
_SGD = OptimConfig("sgd", lr=0.01, weight_decay=1e-4)
_BEIT_L = "eva_large_patch14_196"


def _pair(teacher: str, student: str, distill: DistillConfig, optim: OptimConfig, **more) -> RunConfig:
    return RunConfig(
        recipe="",
        student=student,
        teacher=teacher,
        teacher_weights="none",
        distill=distill,
        optim=optim,
        data=DataConfig(image_size=more.pop("image_size", 224)),
        **more,
    )


def _tiny() -> RunConfig:
    return _pair(
        "swin_tiny_patch4_window7_224",
        "resnet18",
        DistillConfig(),
        _SGD,
        image_size=64,
        teacher_kwargs={"patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4]},
        student_kwargs={"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 64], "stem_type": "deep", "stem_width": 16},
    )


# every pair has all four feature terms and KD, so that pairs can be compared; the published Swin-S recipes leave KD out
PAIRS = {
    "swin_small-resnet50": lambda: _pair(
        "swin_small_patch4_window7_224",
        "resnet50",
        DistillConfig(heads_s3=3, heads_s4=6, softmax_scale=5.0),
        _SGD,
    ),
    "swin_large-resnet50": lambda: _pair("swin_large_patch4_window7_224", "resnet50", _SWIN, _LAMB),
    "swin_large-mobilenetv1": lambda: _pair("swin_large_patch4_window7_224", "mobilenetv1_100", _SWIN, _LAMB),
    "beit_large-resnet50": lambda: _pair(_BEIT_L, "resnet50", _BEIT, _LAMB),
    "beit_large-vit_base": lambda: _pair(
        _BEIT_L, "vit_base_patch16_224", _BEIT, OptimConfig("adamw"), student_kwargs={"patch_size": 14}
    ),
    # DINOv2 was trained at 518 pixels; at 224 its grid is 16x16
    "dinov2_large-convnext_tiny": lambda: _pair(
        "vit_large_patch14_dinov2", "convnext_tiny", _BEIT, OptimConfig("adamw"), teacher_kwargs={"num_classes": 1000}
    ),
    "swin_tiny-resnet18": lambda: _pair(
        "swin_tiny_patch4_window7_224",
        "resnet18",
        DistillConfig(heads_s3=3, heads_s4=6, softmax_scale=5.0),
        _SGD,
    ),
    "tiny": _tiny,
}


def config_of(pair: str | None, recipe: str | None) -> RunConfig:
    """The run of a pair, or of a recipe with random weights.

    Args:
        pair: A key of `PAIRS`, or None.
        recipe: A name of a recipe, or None.

    Raises:
        ValueError: The name is unknown, the recipe has no teacher that timm can build, or not exactly one of both is given.
    """
    if (pair is None) == (recipe is None):
        raise ValueError("pair and recipe: give one of the two.")
    kind, name, known = ("pair", pair, PAIRS) if recipe is None else ("recipe", recipe, RECIPES)
    if name not in known:
        raise ValueError(f"{kind} is {name!r}: it must be one of {', '.join(known)}.")
    cfg = known[name]()
    if cfg.teacher == "none" or cfg.teacher.endswith(".safetensors"):
        raise ValueError(f"recipe is {name!r}: it must have a teacher that timm can build.")
    cfg.teacher_weights, cfg.student_weights = "none", "none"
    return cfg
