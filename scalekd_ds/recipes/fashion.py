"""The quickstart's runs on Fashion-MNIST at 32x32 pixels: the teacher, the distilled student, and its two baselines."""

from __future__ import annotations

from dataclasses import replace

from scalekd_ds.config import DataConfig, OptimConfig, RunConfig, RunDirConfig, ScheduleConfig

_FASHION = DataConfig(
    root="runs/fashion-mnist",
    image_size=32,
    # the garments are centred and cut out already: cropping and flipping did not raise the accuracy
    random_crop=False,
    hflip=0.0,
    eval_batch_size=500,
    threads=1,
)
_FASHION_RUN = RunDirConfig(ds_config="cpu_fp32", eval_every=0.0, save_every=0, log_every=50)


def fashion_teacher() -> RunConfig:
    """A small Swin trained from scratch on all of Fashion-MNIST, without augmentation: the quickstart's teacher.

    Two stages (8x8 tokens of 48 channels, then 4x4 of 96). `moco` initialisation (Xavier) matters: timm's default
    standard deviation of 0.02 learns slowly at 48 channels.
    """
    return RunConfig(
        recipe="fashion-teacher",
        student="swin_tiny_patch4_window7_224",
        student_kwargs={
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 48,
            "depths": [1, 2],
            "num_heads": [3, 6],
            "window_size": 4,
            "drop_path_rate": 0.0,
            "weight_init": "moco",
        },
        global_batch_size=128,
        micro_batch_size=128,
        data=_FASHION,
        optim=OptimConfig("adamw", lr=3e-3, weight_decay=0.05),
        schedule=ScheduleConfig("cosine", epochs=3, warmup_epochs=0.45, warmup_factor=0.04),
        run=replace(_FASHION_RUN, dir="runs/quickstart/teacher"),
    )


def fashion_scalekd() -> RunConfig:
    """A slim ResNet that sees 1,000 images of Fashion-MNIST, distilled from `fashion-teacher` with every term."""
    return RunConfig(
        recipe="fashion-scalekd",
        student="resnet18",
        student_kwargs={
            "layers": [1, 1, 1, 1],
            "channels": [16, 32, 64, 64],
            "output_stride": 8,
        },
        # these maps are 8x8 and 4x4, the grids of the teacher's own stages
        student_taps=(1, 4),
        teacher="runs/quickstart/teacher/student.safetensors",
        global_batch_size=64,
        micro_batch_size=64,
        data=replace(_FASHION, train_images=1000),
        optim=OptimConfig("adamw", lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig("cosine", epochs=30, warmup_epochs=4.5, warmup_factor=0.04),
        run=replace(_FASHION_RUN, dir="runs/quickstart/scalekd"),
    )


def fashion_kd() -> RunConfig:
    """`fashion-scalekd` with the feature terms off: logit KD alone."""
    cfg = fashion_scalekd()
    return replace(
        cfg,
        recipe="fashion-kd",
        distill=replace(cfg.distill, features=False),
        run=replace(cfg.run, dir="runs/quickstart/kd"),
    )


def fashion_ce() -> RunConfig:
    """`fashion-scalekd` without a teacher: the baseline."""
    cfg = fashion_scalekd()
    return replace(cfg, recipe="fashion-ce", teacher="none", run=replace(cfg.run, dir="runs/quickstart/ce"))
