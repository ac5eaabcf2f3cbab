"""The 17 published ImageNet-1K settings, the eleven pairs of the paper's Table 3 among them.

Each is the intended setting. What all published files do otherwise: the teacher runs in train mode, with its stochastic
depth; mixup and cutmix are configured and never happen; the learning rate stays the same on another batch than it was made
for; a teacher with its own normalisation gets the student's. The first three are switches, `--as_published.*`. The docstring
of each recipe names what its own file does otherwise.

RandAugment levels are of timm's ten: 7 of 8 is 8.75 (9 here, timm takes whole ones), 12 of 15 is 8, noise likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from scalekd_ds.config import (
    DataConfig,
    DistillConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    RunDirConfig,
    ScheduleConfig,
)
from scalekd_ds.recipes.departures import departures

# -- what pairs share ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherModel:
    """A published teacher.

    Attributes:
        name: timm name.
        weights: Of the spatial and the frequency view, at both stages.
        softmax_scale: gamma with most students.
        drop_path: Stochastic depth in its published file, which only `as_published.teacher_in_train_mode` lets run.
    """

    name: str
    weights: tuple[float, float]
    softmax_scale: float
    drop_path: float


# top-1 of the paper: Swin-L 86.24, BEiT-L by EVA 88.58 (of which the published files load another fine-tuning)
SWIN_S = TeacherModel("swin_small_patch4_window7_224.ms_in1k", (0.08, 0.06), 5.0, 0.3)
SWIN_B = TeacherModel("swin_base_patch4_window7_224.ms_in22k_ft_in1k", (0.08, 0.06), 5.0, 0.5)
SWIN_L = TeacherModel("swin_large_patch4_window7_224.ms_in22k_ft_in1k", (0.08, 0.06), 5.0, 0.1)
EVA_L = TeacherModel("eva_large_patch14_196.in22k_ft_in22k_in1k", (0.016, 0.008), 1.0, 0.0)


@dataclass(frozen=True)
class Strategy:
    """How a kind of student is trained over 300 epochs (100 for SGD), before what its recipe changes.

    Attributes:
        optim: Its `lr` holds for `optim.base_batch` images.
        schedule: Warm-up and decay.
        policy: RandAugment, as timm names it.
        erasing: Probability of random erasing, with noise.
        smoothing: Label smoothing.
        loss: Student loss on the labels.
    """

    optim: OptimConfig
    schedule: ScheduleConfig
    policy: str = ""
    erasing: float = 0.0
    smoothing: float = 0.0
    loss: Literal["ce", "bce"] = "ce"


TRADITIONAL = Strategy(
    OptimConfig("sgd", lr=0.1, base_batch=256, weight_decay=1e-4, momentum=0.9, no_decay="none"),
    ScheduleConfig("multistep", epochs=100, milestones=(30, 60, 90), gamma=0.1),
)
# ViTs, Swin, ConvNeXt
TRANSFORMER = Strategy(
    OptimConfig("adamw", lr=1e-3, base_batch=1024, weight_decay=0.05, clip=5.0),
    ScheduleConfig("cosine", epochs=300, warmup_epochs=20, warmup_factor=1e-3, min_lr=1e-5),
    policy="rand-m9-n2-mstd0.5-inc1",
    erasing=0.25,
    smoothing=0.1,
)
MIXER = Strategy(
    OptimConfig("adamw", lr=7e-4, base_batch=1536, weight_decay=0.067, no_decay="embeddings", clip=1.0),
    ScheduleConfig("cosine", epochs=300, warmup_epochs=20, warmup_factor=1e-6),
    policy="rand-m8-n2-mstd0.33-inc1",
    erasing=0.25,
)
CNN = Strategy(
    OptimConfig("lamb", lr=5e-3, base_batch=2048, weight_decay=0.02, no_decay="none", eps=1e-6, clip=5.0),
    ScheduleConfig("cosine", epochs=300, warmup_epochs=5, warmup_factor=0.25),
    policy="rand-m9-n2-mstd0.63-inc1",
    erasing=0.25,
    loss="bce",
)

# -- where they differ ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One published file. None takes what the teacher or the strategy has.

    Attributes:
        teacher: Teacher.
        student: timm name.
        strategy: How the student is trained.
        micro: Images on one GPU.
        gpus: Of the published job; micro * gpus is the global batch.
        heads: Of the projectors at stages n-1 and n.
        about: Its line in the listing.
        student_kwargs: Further arguments of the student's constructor.
        table3: Top-1 in the paper's Table 3, in percent: the student alone, and distilled.
        drop_path: Stochastic depth of the student, as a probability at the last block.
        softmax_scale: gamma.
        weights: Of both views at both stages.
        weights_s4: At the last stage alone.
        kd: Weight a of logit KD.
        norm: After the projector's convolution.
        ema: Decay of the student's average; 0 keeps none.
        ema_evaluate: Whether the average is what is measured and shipped.
        sync_bn: BatchNorm of the student over all ranks.
        image_size: Side in pixels, of both models.
        mixup: alpha.
        cutmix: alpha.
        optim: Fields of the strategy's optimizer that differ.
        smoothing: Label smoothing.
        loss: Student loss.
        erasing: Probability of random erasing.
        schedule: Another schedule.
    """

    teacher: TeacherModel
    student: str
    strategy: Strategy
    micro: int
    gpus: int
    heads: tuple[int, int]
    about: str
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    softmax_scale: float | None = None
    weights: tuple[float, float] | None = None
    weights_s4: tuple[float, float] | None = None
    table3: tuple[float, float] | None = None
    kd: float = 0.5
    norm: Literal["batch", "layer"] = "batch"
    ema: float = 0.0
    ema_evaluate: bool = True
    sync_bn: bool = False
    image_size: int = 224
    mixup: float = 0.0
    cutmix: float = 0.0
    optim: dict[str, Any] = field(default_factory=dict)
    smoothing: float | None = None
    loss: Literal["ce", "bce"] | None = None
    erasing: float | None = None
    schedule: ScheduleConfig | None = None


# a plain ViT as the published one: patches alone go through the encoder, and their mean to the head
_NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_AVERAGE = 0.9999

PAIRS: dict[str, Pair] = {
    # SGD, 100 epochs, crop and flip alone, 8 GPUs of 32 images
    "swin_s-resnet50-traditional": Pair(
        SWIN_S, "resnet50", TRADITIONAL, 32, 8, (3, 6), "Swin-S -> ResNet-50, 100 epochs, no logit KD",
        weights_s4=(0.08, 0.0), kd=0.0, sync_bn=True,
    ),
    "swin_b-resnet50-traditional": Pair(
        SWIN_B, "resnet50", TRADITIONAL, 32, 8, (8, 16), "Swin-B -> ResNet-50, 100 epochs (its file does not start)",
        sync_bn=True,
    ),
    "swin_l-resnet50-traditional": Pair(
        SWIN_L, "resnet50", TRADITIONAL, 32, 8, (16, 24), "Swin-L -> ResNet-50, 100 epochs", sync_bn=True
    ),
    "swin_l-mobilenetv1-traditional": Pair(
        SWIN_L, "mobilenetv1_100", TRADITIONAL, 32, 8, (16, 24), "Swin-L -> MobileNet-V1, 100 epochs",
        smoothing=0.1, schedule=ScheduleConfig("cosine", epochs=100),
    ),
    # filed as advanced, but the traditional strategy on a batch of 1,024; the file names Swin-L's weights for a Swin-S
    "swin_s-resnet50-advanced": Pair(
        SWIN_S, "resnet50", TRADITIONAL, 32, 32, (3, 6), "Swin-S -> ResNet-50, 100 epochs, batch 1,024, no logit KD",
        weights_s4=(0.08, 0.0), kd=0.0, sync_bn=True,
    ),
    # the paper's Table 3: Swin-L
    "swin_l-mobilenetv1-advanced": Pair(
        SWIN_L, "mobilenetv1_100", CNN, 64, 32, (16, 24), "Swin-L -> MobileNet-V1", table3=(72.10, 75.15),
        optim={"lr": 2e-3, "weight_decay": 4e-3, "clip": 0.0}, loss="ce", smoothing=0.1, erasing=0.0,
    ),
    "swin_l-resnet50-advanced": Pair(
        SWIN_L, "resnet50d", CNN, 64, 32, (16, 24), "Swin-L -> ResNet-50 (V1d)", table3=(78.64, 82.03)
    ),
    "swin_l-convnext_t-advanced": Pair(
        SWIN_L, "convnext_tiny", TRANSFORMER, 32, 32, (8, 16), "Swin-L -> ConvNeXt-T", table3=(82.14, 84.16),
        drop_path=0.1, softmax_scale=1.0, ema=_AVERAGE, optim={"clip": 0.0},
    ),
    "swin_l-mixer_s16-advanced": Pair(
        SWIN_L, "mixer_s16_224", MIXER, 24, 32, (8, 8), "Swin-L -> Mixer-S/16", table3=(74.02, 78.63),
        ema=_AVERAGE, ema_evaluate=False,
    ),
    "swin_l-mixer_b16-advanced": Pair(
        SWIN_L, "mixer_b16_224", MIXER, 48, 32, (8, 8), "Swin-L -> Mixer-B/16", table3=(76.44, 81.96),
        drop_path=0.1, sync_bn=True,
    ),
    "swin_l-vit_s16-advanced": Pair(
        SWIN_L, "deit_small_patch16_224", TRANSFORMER, 32, 32, (8, 8), "Swin-L -> ViT-S/16", table3=(79.90, 83.93),
        student_kwargs=_NO_CLASS_TOKEN, ema=_AVERAGE,
    ),
    "swin_l-swin_t-advanced": Pair(
        SWIN_L, "swin_tiny_patch4_window7_224", TRANSFORMER, 16, 32, (24, 48),
        "Swin-L -> Swin-T (its file does not start)", table3=(81.18, 83.80),
        drop_path=0.05, softmax_scale=1.0, norm="layer", ema=_AVERAGE,
    ),
    "swin_l-vit_b16-advanced": Pair(
        SWIN_L, "deit_base_patch16_224", TRANSFORMER, 16, 32, (8, 8), "Swin-L -> ViT-B/16", table3=(81.80, 85.53),
        student_kwargs=_NO_CLASS_TOKEN, ema=_AVERAGE,
    ),
    # the paper's Table 3: BEiT-L/14, by EVA; none of these files starts
    "eva_l-resnet50-advanced": Pair(
        EVA_L, "resnet50d", CNN, 64, 32, (8, 8), "BEiT-L/14 -> ResNet-50 (V1d)", table3=(78.64, 82.34), softmax_scale=0.2
    ),
    "eva_l-mixer_b14-advanced": Pair(
        EVA_L, "mixer_b14_224", MIXER, 24, 32, (8, 8), "BEiT-L/14 -> Mixer-B/14", table3=(76.62, 82.89),
        drop_path=0.1, ema=_AVERAGE, smoothing=0.1, mixup=0.5,
    ),
    "eva_l-vit_b14-advanced": Pair(
        EVA_L, "deit_base_patch16_224", TRANSFORMER, 32, 32, (8, 8), "BEiT-L/14 -> ViT-B/14", table3=(82.02, 86.43),
        student_kwargs={"patch_size": 14, **_NO_CLASS_TOKEN}, mixup=0.8, cutmix=1.0,
    ),
    # in no table of the paper
    "eva_l-eva02_s14_336-advanced": Pair(
        EVA_L, "eva02_small_patch14_336.mim_in22k_ft_in1k", TRANSFORMER, 16, 32, (8, 8),
        "BEiT-L/14 -> EVA-02-S/14 at 336 px (its file does not start)",
        drop_path=0.1, weights=(0.008, 0.004), ema=_AVERAGE, optim={"clip": 0.0}, image_size=336,
    ),
}  # fmt: skip

# -- from a row to a run -------------------------------------------------------------------------------------------


def run_of(name: str, pair: Pair) -> RunConfig:
    """The whole run of a row."""
    strategy, teacher = pair.strategy, pair.teacher

    def chosen(own: Any, default: Any) -> Any:
        return default if own is None else own

    weights = chosen(pair.weights, teacher.weights)
    kwargs = dict(pair.student_kwargs)
    if pair.drop_path:
        kwargs["drop_path_rate"] = pair.drop_path
    return RunConfig(
        recipe=name,
        student=pair.student,
        student_kwargs=kwargs,
        student_sync_bn=pair.sync_bn,
        teacher=teacher.name,
        teacher_kwargs={"drop_path_rate": teacher.drop_path},
        teacher_image_size=pair.image_size,
        loss=chosen(pair.loss, strategy.loss),
        label_smoothing=chosen(pair.smoothing, strategy.smoothing),
        global_batch_size=pair.micro * pair.gpus,
        micro_batch_size=pair.micro,
        distill=DistillConfig(
            kd_weight=pair.kd,
            weights_s3=weights,
            weights_s4=chosen(pair.weights_s4, weights),
            heads_s3=pair.heads[0],
            heads_s4=pair.heads[1],
            softmax_scale=chosen(pair.softmax_scale, teacher.softmax_scale),
            norm=pair.norm,
        ),
        data=DataConfig(
            image_size=pair.image_size,
            auto_augment=strategy.policy,
            random_erasing=chosen(pair.erasing, strategy.erasing),
            mixup=pair.mixup,
            cutmix=pair.cutmix,
            interpolation="bicubic" if strategy.policy else "bilinear",
            threads=4,
        ),
        optim=replace(strategy.optim, **pair.optim),
        ema=EmaConfig(pair.ema, pair.ema_evaluate),
        schedule=pair.schedule or strategy.schedule,
        run=RunDirConfig(dir=f"runs/{name}", ds_config="zero1", log_every=50, save_every=2500),
    )


def published_baseline(recipe: str, num_classes: int) -> float | None:
    """Top-1 in percent of a recipe's student without a teacher (the paper's Table 3), where the data can be ImageNet-1K."""
    pair = PAIRS.get(recipe)
    return pair.table3[0] if pair is not None and pair.table3 and num_classes == 1000 else None


def _recipe(name: str) -> Callable[[], RunConfig]:
    recipe, pair = partial(run_of, name, PAIRS[name]), PAIRS[name]
    accuracy = f": {pair.table3[0]:.2f} -> {pair.table3[1]:.2f}" if pair.table3 else ""
    recipe.__doc__ = f"{pair.about}{accuracy}\n\nThe published file {'; '.join(departures(recipe()))}."
    return recipe


RECIPES: dict[str, Callable[[], RunConfig]] = {name: _recipe(name) for name in PAIRS}
