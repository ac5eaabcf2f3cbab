"""`OptimConfig`, `EmaConfig` and `ScheduleConfig`: optimizer, moving average, and the learning rate over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config.require import require


@dataclass
class OptimConfig:
    """Optimizer and its step.

    Attributes:
        name: Which optimizer.
        lr: Learning rate after warm-up, for a global batch of `base_batch` or, where that is None, for the run's own.
        base_batch: Global batch that `lr` is meant for; for others it is scaled in proportion. None does not scale it.
        weight_decay: Decoupled for AdamW and LAMB, L2 for SGD.
        no_decay: Parameters without weight decay. `1d`: norms, biases and other one-dimensional parameters, position
            embeddings, class tokens and the projectors' queries; `embeddings`: position embeddings and class tokens;
            `none`: every parameter decays.
        momentum: Momentum of SGD, without Nesterov.
        betas: Decay rates of the two moments of AdamW and LAMB.
        eps: Added to the denominator of AdamW and LAMB.
        clip: Largest global gradient norm; 0 is no clipping.
    """

    name: Literal["sgd", "adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    base_batch: int | None = None
    weight_decay: float = 0.05
    no_decay: Literal["1d", "embeddings", "none"] = "1d"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0.0, "optim.lr", self.lr, "positive")
        require(self.base_batch is None or self.base_batch > 0, "optim.base_batch", self.base_batch, "at least 1")
        require(self.weight_decay >= 0.0, "optim.weight_decay", self.weight_decay, "not negative")
        require(self.eps >= 0.0, "optim.eps", self.eps, "not negative")
        require(min(self.betas) >= 0.0 and max(self.betas) < 1.0, "optim.betas", self.betas, "two rates in [0, 1)")
        require(0.0 <= self.momentum < 1.0, "optim.momentum", self.momentum, "in [0, 1)")
        require(self.clip >= 0.0, "optim.clip", self.clip, "not negative (0 is off)")


@dataclass
class EmaConfig:
    """Moving average of the student's weights.

    After each optimizer step, average <- decay * average + (1 - decay) * weights.

    Attributes:
        decay: Share of the old average that stays, the same from the first step on; 0 keeps no average. (The published
            momentum is 1 - decay.)
        evaluate: The average, and not the weights themselves, is shipped as student.safetensors and counts as `top1`.
            It is measured in any case.
    """

    decay: float = 0.0
    evaluate: bool = True

    def __post_init__(self) -> None:
        require(0.0 <= self.decay < 1.0, "ema.decay", self.decay, "in [0, 1) (0 is off)")


@dataclass
class ScheduleConfig:
    """Learning rate over the run, a pure function of the step.

    Attributes:
        name: How the rate falls after warm-up: `cosine`, `multistep` or `constant`.
        epochs: Length of the run in passes over the training images.
        warmup_epochs: Linear warm-up from `warmup_factor` * lr to lr.
        warmup_factor: Where warm-up starts, as a share of lr.
        min_lr: Learning rate that `cosine` ends with.
        milestones: Epochs after which `multistep` multiplies the rate by `gamma`.
        gamma: Factor of `multistep`.
    """

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    epochs: float = 100.0
    warmup_epochs: float = 0.0
    warmup_factor: float = 1e-3
    min_lr: float = 0.0
    milestones: tuple[float, ...] = (30.0, 60.0, 90.0)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        # integers become floats, so that a dumped configuration is the same however the value was typed
        self.epochs, self.warmup_epochs = float(self.epochs), float(self.warmup_epochs)
        self.milestones = tuple(float(m) for m in self.milestones)
        require(self.epochs > 0.0, "schedule.epochs", self.epochs, "positive")
        require(0.0 <= self.warmup_epochs < self.epochs, "schedule.warmup_epochs", self.warmup_epochs, "in [0, epochs)")
        require(self.min_lr >= 0.0, "schedule.min_lr", self.min_lr, "not negative")
        require(self.gamma > 0.0, "schedule.gamma", self.gamma, "positive")
        require(0.0 <= self.warmup_factor <= 1.0, "schedule.warmup_factor", self.warmup_factor, "0 to 1")
