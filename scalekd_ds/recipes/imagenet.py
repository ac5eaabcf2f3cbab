"""The 17 published ImageNet-1K settings, the eleven pairs of the paper's Table 3 among them.

Each recipe is the setting as it is meant. All published files depart from it in four ways: the teacher runs in train
mode, with stochastic depth; mixup and cutmix are configured and never happen; the learning rate is not scaled to the
global batch; and a teacher with another normalisation than the student's is given images in the student's. The first
three are switches, `--as_published.*`. The docstring of each recipe names what its own file does otherwise.

timm has ten levels of RandAugment, to which the published ones are converted: 7 of 8 is 8.75 (here 9, as timm takes
whole levels), and 12 of 15 is 8. The standard deviation of the level is converted in the same way.
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

# -- what settings share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherModel:
    """A published teacher.

    Attributes:
        name: timm name.
        weights: (spatial, frequency) weights of the feature terms, at both stages.
        softmax_scale: gamma of the projectors' attention, with most students.
        drop_path: Stochastic depth in its published file, which only `as_published.teacher_in_train_mode` lets run.
    """

    name: str
    weights: tuple[float, float]
    softmax_scale: float
    drop_path: float


# top-1 in the paper: Swin-L 86.24, EVA's BEiT-L 88.58, of which the published files load another fine-tuning
SWIN_S = TeacherModel("swin_small_patch4_window7_224.ms_in1k", (0.08, 0.06), 5.0, 0.3)
SWIN_B = TeacherModel("swin_base_patch4_window7_224.ms_in22k_ft_in1k", (0.08, 0.06), 5.0, 0.5)
SWIN_L = TeacherModel("swin_large_patch4_window7_224.ms_in22k_ft_in1k", (0.08, 0.06), 5.0, 0.1)
EVA_L = TeacherModel("eva_large_patch14_196.in22k_ft_in22k_in1k", (0.016, 0.008), 1.0, 0.0)


@dataclass(frozen=True)
class Strategy:
    """How students of one kind are trained, unless their setting says otherwise.

    Attributes:
        optim: Optimizer, whose `lr` is meant for a global batch of `base_batch`.
        schedule: Length, warm-up and decay of the learning rate.
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
# for ViTs, Swin and ConvNeXt
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

# -- the settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The setting of one published file. None takes the value of the teacher or the strategy.

    Attributes:
        teacher: The teacher.
        student: timm name of the student.
        strategy: How the student is trained.
        micro: Images on one GPU.
        gpus: GPUs of the published job; micro * gpus is the global batch.
        heads: Heads of the projectors at stages n-1 and n.
        about: Its line in the list of recipes.
        student_kwargs: Further arguments of the student's constructor.
        drop_path: Stochastic depth of the student, as a probability at the last block.
        softmax_scale: gamma of the projectors' attention.
        weights: (spatial, frequency) weights of the feature terms, at both stages.
        weights_s4: (spatial, frequency) weights at the last stage, where they differ from `weights`.
        table3: Top-1 in the paper's Table 3, in percent: the student alone, and distilled.
        kd: Weight a of logit KD.
        norm: Norm after the projectors' convolution.
        ema: Decay of the student's moving average; 0 keeps none.
        ema_evaluate: Whether the moving average is what is measured and shipped.
        sync_bn: The student's BatchNorm takes its statistics over all ranks.
        image_size: Side of both models' images in pixels.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        optim: Fields of the strategy's optimizer that have other values.
        smoothing: Label smoothing.
        loss: Student loss on the labels.
        erasing: Probability of random erasing.
        schedule: Schedule in place of the strategy's.
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


# the published plain ViTs: patch tokens alone go through the encoder, and their mean to the head
_NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_EMA_DECAY = 0.9999

PAIRS: dict[str, Pair] = {
    # SGD for 100 epochs, with crop and flip alone, on 8 GPUs of 32 images
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
    # named advanced, but trained by the traditional strategy with a global batch of 1,024
    "swin_s-resnet50-advanced": Pair(
        SWIN_S, "resnet50", TRADITIONAL, 32, 32, (3, 6), "Swin-S -> ResNet-50, 100 epochs, batch 1,024, no logit KD",
        weights_s4=(0.08, 0.0), kd=0.0, sync_bn=True,
    ),
    # the paper's Table 3 with Swin-L
    "swin_l-mobilenetv1-advanced": Pair(
        SWIN_L, "mobilenetv1_100", CNN, 64, 32, (16, 24), "Swin-L -> MobileNet-V1", table3=(72.10, 75.15),
        optim={"lr": 2e-3, "weight_decay": 4e-3, "clip": 0.0}, loss="ce", smoothing=0.1, erasing=0.0,
    ),
    "swin_l-resnet50-advanced": Pair(
        SWIN_L, "resnet50d", CNN, 64, 32, (16, 24), "Swin-L -> ResNet-50 (V1d)", table3=(78.64, 82.03)
    ),
    "swin_l-convnext_t-advanced": Pair(
        SWIN_L, "convnext_tiny", TRANSFORMER, 32, 32, (8, 16), "Swin-L -> ConvNeXt-T", table3=(82.14, 84.16),
        drop_path=0.1, softmax_scale=1.0, ema=_EMA_DECAY, optim={"clip": 0.0},
    ),
    "swin_l-mixer_s16-advanced": Pair(
        SWIN_L, "mixer_s16_224", MIXER, 24, 32, (8, 8), "Swin-L -> Mixer-S/16", table3=(74.02, 78.63),
        ema=_EMA_DECAY, ema_evaluate=False,
    ),
    "swin_l-mixer_b16-advanced": Pair(
        SWIN_L, "mixer_b16_224", MIXER, 48, 32, (8, 8), "Swin-L -> Mixer-B/16", table3=(76.44, 81.96),
        drop_path=0.1, sync_bn=True,
    ),
    "swin_l-vit_s16-advanced": Pair(
        SWIN_L, "deit_small_patch16_224", TRANSFORMER, 32, 32, (8, 8), "Swin-L -> ViT-S/16", table3=(79.90, 83.93),
        student_kwargs=_NO_CLASS_TOKEN, ema=_EMA_DECAY,
    ),
    "swin_l-swin_t-advanced": Pair(
        SWIN_L, "swin_tiny_patch4_window7_224", TRANSFORMER, 16, 32, (24, 48),
        "Swin-L -> Swin-T (its file does not start)", table3=(81.18, 83.80),
        drop_path=0.05, softmax_scale=1.0, norm="layer", ema=_EMA_DECAY,
    ),
    "swin_l-vit_b16-advanced": Pair(
        SWIN_L, "deit_base_patch16_224", TRANSFORMER, 16, 32, (8, 8), "Swin-L -> ViT-B/16", table3=(81.80, 85.53),
        student_kwargs=_NO_CLASS_TOKEN, ema=_EMA_DECAY,
    ),
    # the paper's Table 3 with EVA's BEiT-L/14; none of these files starts
    "eva_l-resnet50-advanced": Pair(
        EVA_L, "resnet50d", CNN, 64, 32, (8, 8), "BEiT-L/14 -> ResNet-50 (V1d)", table3=(78.64, 82.34), softmax_scale=0.2
    ),
    "eva_l-mixer_b14-advanced": Pair(
        EVA_L, "mixer_b14_224", MIXER, 24, 32, (8, 8), "BEiT-L/14 -> Mixer-B/14", table3=(76.62, 82.89),
        drop_path=0.1, ema=_EMA_DECAY, smoothing=0.1, mixup=0.5,
    ),
    "eva_l-vit_b14-advanced": Pair(
        EVA_L, "deit_base_patch16_224", TRANSFORMER, 32, 32, (8, 8), "BEiT-L/14 -> ViT-B/14", table3=(82.02, 86.43),
        student_kwargs={"patch_size": 14, **_NO_CLASS_TOKEN}, mixup=0.8, cutmix=1.0,
    ),
    # in no table of the paper
    "eva_l-eva02_s14_336-advanced": Pair(
        EVA_L, "eva02_small_patch14_336.mim_in22k_ft_in1k", TRANSFORMER, 16, 32, (8, 8),
        "BEiT-L/14 -> EVA-02-S/14 at 336 px (its file does not start)",
        drop_path=0.1, weights=(0.008, 0.004), ema=_EMA_DECAY, optim={"clip": 0.0}, image_size=336,
    ),
}  # fmt: skip

# -- from a setting to a run ---------------------------------------------------------------------------------------


def _run_config(name: str, pair: Pair) -> RunConfig:
    """The whole run of a setting."""
    strategy, teacher = pair.strategy, pair.teacher

    def value_or(value: Any, default: Any) -> Any:
        return default if value is None else value

    weights = value_or(pair.weights, teacher.weights)
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
        loss=value_or(pair.loss, strategy.loss),
        label_smoothing=value_or(pair.smoothing, strategy.smoothing),
        global_batch_size=pair.micro * pair.gpus,
        micro_batch_size=pair.micro,
        distill=DistillConfig(
            kd_weight=pair.kd,
            weights_s3=weights,
            weights_s4=value_or(pair.weights_s4, weights),
            heads_s3=pair.heads[0],
            heads_s4=pair.heads[1],
            softmax_scale=value_or(pair.softmax_scale, teacher.softmax_scale),
            norm=pair.norm,
        ),
        data=DataConfig(
            image_size=pair.image_size,
            auto_augment=strategy.policy,
            random_erasing=value_or(pair.erasing, strategy.erasing),
            mixup=pair.mixup,
            cutmix=pair.cutmix,
            interpolation="bicubic" if strategy.policy else "bilinear",
        ),
        optim=replace(strategy.optim, **pair.optim),
        ema=EmaConfig(pair.ema, pair.ema_evaluate),
        schedule=pair.schedule or strategy.schedule,
        run=RunDirConfig(dir=f"runs/{name}", ds_config="zero1", log_every=50, save_every=2500),
    )


def published_baseline(recipe: str, num_classes: int) -> float | None:
    """Top-1 in percent of a recipe's student without a teacher, by the paper's Table 3.

    None where the table does not have the recipe, or the data does not have ImageNet-1K's number of classes.
    """
    pair = PAIRS.get(recipe)
    return pair.table3[0] if pair is not None and pair.table3 and num_classes == 1000 else None


def _recipe(name: str) -> Callable[[], RunConfig]:
    """The recipe of a setting, whose docstring has the paper's accuracy and the departures of the published file."""
    pair = PAIRS[name]
    recipe = partial(_run_config, name, pair)
    accuracy = f": {pair.table3[0]:.2f} -> {pair.table3[1]:.2f}" if pair.table3 else ""
    recipe.__doc__ = f"{pair.about}{accuracy}\n\nThe published file {'; '.join(departures(recipe()))}."
    return recipe


RECIPES: dict[str, Callable[[], RunConfig]] = {name: _recipe(name) for name in PAIRS}
