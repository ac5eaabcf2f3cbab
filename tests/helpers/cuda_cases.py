"""Pairs and options whose step runs on fake CUDA tensors, and the most kernels that each part of the pairs' may launch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from scalekd_ds.config import DataConfig, DistillConfig, OptimConfig, RunConfig


@dataclass
class Case:
    """One step.

    Attributes:
        cfg: The run.
        options: Fields of `DistillConfig` that the case is about.
        dtype: Autocast's, as an attribute of torch; None is float32.
        device: Number of the GPU; 0 is the current one.
        accumulation: Micro batches.
        mixes: Mixup and cutmix.
        unlabelled: Images without labels.
        moved_first: Both models are on the GPU before `ScaleKD` is built, as in an own loop.
        attention: The attention that the table names for every shape.
        steps: Steps that are made, of which the last is counted: 2 where the first one makes what stays.
        evaluates: Student and teacher are evaluated, too.
        has_state: The optimizer has its state and the average its first value, as after a first step.
    """

    cfg: RunConfig
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = "bfloat16"
    device: int = 0
    accumulation: int = 1
    mixes: bool = False
    unlabelled: bool = False
    moved_first: bool = False
    attention: str = "sdpa"
    steps: int = 1
    evaluates: bool = False
    has_state: bool = False


_ADAMW, _SGD, _LAMB = OptimConfig("adamw"), OptimConfig("sgd", lr=0.01), OptimConfig("lamb", lr=5e-3)


def _pair(teacher: str, student: str, optim: OptimConfig = _ADAMW, size: int = 224, **more: Any) -> RunConfig:
    distill = DistillConfig(**more.pop("distill", {}))
    return RunConfig(
        recipe="",
        teacher=teacher,
        student=student,
        teacher_weights="none",
        distill=distill,
        optim=optim,
        data=DataConfig(image_size=size),
        **more,
    )


def _shallow(*args: Any, depth: Any, **more: Any) -> RunConfig:
    return _pair(*args, teacher_kwargs={"depths" if isinstance(depth, tuple) else "depth": depth}, **more)


_EIGHT = {"heads_s3": 8, "heads_s4": 8}
_SWIN, _NO_KD = "swin_large_patch4_window7_224", {"distill": {"kd_weight": 0.0}}
# at full depth: the pairs of docs/performance.md
MEASURED = {
    "Swin-L → ResNet-50": _pair(_SWIN, "resnet50", _LAMB, distill={"heads_s3": 16, "heads_s4": 24}),
    "BEiT-L → ViT-B": _pair("beit_large_patch16_224", "vit_base_patch16_224", distill=_EIGHT | {"softmax_scale": 1.0}),
    "EVA-L → ViT-B": _pair(
        "eva_large_patch14_196", "vit_base_patch16_224", student_kwargs={"patch_size": 14}, distill=_EIGHT
    ),
    "Swin-L → Mixer-S": _pair(_SWIN, "mixer_s16_224", distill=_EIGHT),
    "DINOv2-L → ConvNeXt-T": _pair("vit_large_patch14_dinov2", "convnext_tiny", teacher_image_size=224, **_NO_KD),
}
# every family of teachers, with few blocks: more of them would run the same lines
_FOUR = {"student_kwargs": {"depth": 4}}
SHALLOW = {
    "Swin v2 → ResNet-18-D": _shallow("swinv2_base_window8_256", "resnet18d", size=256, depth=(1, 1, 2, 2)),
    "EVA-02 → DeiT III": _shallow("eva02_large_patch14_224", "deit3_small_patch16_224", depth=4, **_FOUR, **_NO_KD),
    "DINOv3 → ViT-S": _shallow("vit_large_patch16_dinov3", "vit_small_patch16_224", depth=4, **_FOUR, **_NO_KD),
    "SigLIP → MobileNet v3": _shallow("vit_base_patch16_siglip_224", "mobilenetv3_small_100", depth=4, **_NO_KD),
    "CLIP → MobileNet v1": _shallow("vit_base_patch16_clip_224", "mobilenetv1_100", depth=4, **_NO_KD),
    "DeiT → ResNet-18": _shallow("deit_base_patch16_224", "resnet18", depth=4),
    "ConvNeXt → ResNet-18": _shallow("convnext_base", "resnet18", depth=(1, 1, 2, 2)),
    "PVT v2 → RegNet": _shallow("pvt_v2_b5", "regnetx_002", depth=(1, 1, 2, 2)),
}
PAIRS = {name: Case(cfg, has_state=True) for name, cfg in MEASURED.items()}
# the optimizer of these is counted above
PAIRS |= {name: Case(replace(cfg, optim=OptimConfig("sgd", momentum=0.0))) for name, cfg in SHALLOW.items()}
PAIRS["DeiT → ResNet-18"].evaluates = True

_TINY = _pair(
    "swin_tiny_patch4_window7_224",
    "resnet18",
    _SGD,
    size=64,
    teacher_kwargs={"patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]},
    student_kwargs={"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 64], "stem_type": "deep", "stem_width": 16},
)


def _with(**options: Any) -> Case:
    return Case(replace(_TINY, distill=DistillConfig(**options)), options)


# each field of `DistillConfig` at another value than its default
OPTIONS = {
    "no KD": _with(kd_weight=0.0),
    "KD alone of the logits": _with(kd_weight=1.0),
    "temperature": _with(temperature=2.0),
    "without features": _with(features=False),
    "no TPP terms": _with(weights_s3=(0.0, 0.0)),
    "one view of the stage before": _with(weights_s3=(0.0, 0.06)),
    "one view of the last stage": _with(weights_s4=(0.08, 0.0)),
    "heads": _with(heads_s3=2, heads_s4=3),
    "softmax scale": _with(softmax_scale=1.0),
    "LayerNorm": _with(norm="layer"),
    "linear projectors": _with(projector="linear"),
    "without TPP": _with(tpp=False),
    "a wider cut": replace(_with(cut=2), steps=2),
}
# with other means and standard deviations
_MOVED = Case(
    _pair("vit_base_patch16_224", "resnet18", _SGD, teacher_kwargs={"depth": 4}), moved_first=True, dtype=None
)
# heads of 8 channels, which the kernels take
_TRITON = replace(_with(heads_s3=3, heads_s4=6), attention="triton")
# what else changes a step
OTHERS = {
    "float32": Case(_TINY, dtype=None),
    "float16": Case(_TINY, dtype="float16"),
    "BCE of mixed images": Case(replace(_TINY, loss="bce"), mixes=True),
    "CE of mixed images, smoothed": Case(replace(_TINY, label_smoothing=0.1), mixes=True),
    "BCE of labels": Case(replace(_TINY, loss="bce")),
    "without labels": Case(_TINY, unlabelled=True),
    "without a teacher": Case(replace(_TINY, teacher="none")),
    "two micro batches": Case(_TINY, accumulation=2),
    "Triton's attention": _TRITON,
    "the second GPU": Case(_TINY, device=1, evaluates=True),
    "Triton's attention on the second GPU": replace(_TRITON, device=1),
    "LAMB": Case(replace(_TINY, optim=_LAMB), has_state=True),
    "AdamW": Case(replace(_TINY, optim=_ADAMW), has_state=True),
    "models on the GPU before": _MOVED,
    "models on the second GPU before": replace(_MOVED, device=1),
}
CASES = PAIRS | OPTIONS | OTHERS
