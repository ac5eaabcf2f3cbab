"""`RunConfig`: everything that defines one run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from scalekd_ds.config.data import DataConfig
from scalekd_ds.config.distill import AsPublishedConfig, DistillConfig
from scalekd_ds.config.model_kwargs import check_model_kwargs
from scalekd_ds.config.optim import EmaConfig, OptimConfig, ScheduleConfig
from scalekd_ds.config.require import require
from scalekd_ds.config.run_dir import RunDirConfig
from scalekd_ds.errors import UserError


@dataclass
class RunConfig:
    """One run of `launch/train.py`.

    Attributes:
        recipe: Name of the recipe that this configuration started from.
        student: timm name, also a hub's (`hf-hub:` or `local-dir:`), or a consolidated .safetensors with its card
            beside it.
        student_kwargs: Further arguments of the student's constructor, as JSON; not those that a field here decides.
        student_sync_bn: The student's BatchNorm takes its statistics over all ranks, on GPUs; on CPUs there is no such
            operator.
        student_weights: `none` starts from timm's initialisation, `pretrained` from timm's weights, else from a
            .safetensors, .pth or .pt file; a classifier with another number of classes starts fresh.
        student_taps: Indices of the two feature maps that are distilled, as timm's `forward_intermediates` counts them;
            None takes the ones that the published code takes for this kind of model.
        teacher: timm name, also a hub's (`hf-hub:` or `local-dir:`), a consolidated .safetensors with its card beside
            it, or `none` for supervised training.
        teacher_kwargs: Further arguments of the teacher's constructor, as JSON; not those that a field here decides.
        teacher_weights: `pretrained`, `none` (random; for tests), or a .safetensors, .pth or .pt file with timm's
            names, mmpretrain's or those of the original release; its number of classes is the teacher's.
        teacher_image_size: Side of the square that the teacher sees, in pixels; None is its own, or the student's where
            its constructor takes an image size.
        teacher_cache: Folder of a teacher cache (`scalekd cache`), which then gives the teacher's targets; None runs the
            teacher.
        loss: Student loss on the labels; `bce` is summed over classes and averaged over the batch.
        label_smoothing: Label smoothing of `ce`.
        global_batch_size: Images in one optimizer step over all ranks; the same on any number of ranks.
        micro_batch_size: Most images in one forward pass on one rank; gradients are accumulated up to the global batch.
        seed: Seed of every random number generator.
    """

    recipe: str = ""
    student: str = "resnet50"
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    student_sync_bn: bool = False
    student_weights: str = "none"
    student_taps: tuple[int, int] | None = None
    teacher: str = "none"
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_weights: str = "pretrained"
    teacher_image_size: int | None = None
    teacher_cache: str | None = None
    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    global_batch_size: int = 256
    micro_batch_size: int = 32
    seed: int = 0
    # described by the docstrings of their classes, which --help shows
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    as_published: AsPublishedConfig = field(default_factory=AsPublishedConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)

    def __post_init__(self) -> None:
        # each rank adds its number to it
        require(abs(self.seed) < 2**62, "seed", self.seed, "of less than 62 bits")
        require(self.global_batch_size > 0, "global_batch_size", self.global_batch_size, "at least 1")
        require(self.micro_batch_size > 0, "micro_batch_size", self.micro_batch_size, "at least 1")
        require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", self.label_smoothing, "0 to 1")
        require(
            self.label_smoothing == 0.0 or self.loss == "ce", "label_smoothing", self.label_smoothing, "0 with loss bce"
        )
        check_model_kwargs(self.student_kwargs, self.teacher_kwargs, self.data.image_size)

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up, for this run's global batch."""
        base = self.optim.base_batch
        if base is None or self.as_published.unscaled_lr:
            return self.optim.lr
        return self.optim.lr * self.global_batch_size / base

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix mixes the images, of a batch or by view."""
        return (self.data.mixup > 0 or self.data.cutmix > 0) and not self.as_published.no_mixing

    def batches(self, world_size: int) -> tuple[int, int]:
        """(micro batch size, gradient accumulation steps) on `world_size` ranks.

        Raises:
            UserError: The ranks cannot share the global batch evenly.
        """
        if self.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size is {self.global_batch_size}, which {world_size} ranks cannot share evenly: "
                f"choose a multiple of {world_size}."
            )
        per_rank = self.global_batch_size // world_size
        # the largest micro batch that divides a rank's share, so that a step has the same images on any number of ranks
        micro = next(m for m in range(min(self.micro_batch_size, per_rank), 0, -1) if per_rank % m == 0)
        return micro, per_rank // micro

    def as_dict(self) -> dict[str, Any]:
        """The run as plain nested data, for JSON."""
        return dataclasses.asdict(self)
