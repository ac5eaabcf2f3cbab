"""`DistillConfig`, ScaleKD's terms, and `AsPublishedConfig`, the published code's departures from its own settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config.require import require


@dataclass
class DistillConfig:
    """ScaleKD's terms. Weights of 0 switch a term off.

    Attributes:
        kd_weight: a in (1-a) CE + a KD; 0 trains on CE alone beside the feature terms.
        temperature: Temperature of logit KD.
        features: False leaves out the projectors and the feature terms: plain logit KD.
        weights_s3: (spatial, frequency) weights of the stage n-1 terms, which pass through the teacher's last stage.
        weights_s4: (spatial, frequency) weights of the last stage's terms.
        heads_s3: Attention heads of the stage n-1 projectors; None takes the teacher's own.
        heads_s4: Attention heads of the last stage's projectors; None takes the teacher's own.
        softmax_scale: gamma in softmax(gamma QK^T / sqrt(d)) of the projectors' attention.
        norm: Norm after the projectors' convolution.
        projector: `cap` (cross attention), or `linear`, the common 1x1 convolution, for comparison.
        tpp: False compares stage n-1 with the teacher's own stage n-1 instead of passing it through the teacher's last
            stage, and lets the last stage's projectors learn their own queries.
        cut: The frequency view drops the cut x cut lowest DCT frequencies; 1 drops the mean alone.
    """

    kd_weight: float = 0.5
    temperature: float = 1.0
    features: bool = True
    weights_s3: tuple[float, float] = (0.08, 0.06)
    weights_s4: tuple[float, float] = (0.08, 0.06)
    heads_s3: int | None = None
    heads_s4: int | None = None
    softmax_scale: float = 5.0
    norm: Literal["batch", "layer"] = "batch"
    projector: Literal["cap", "linear"] = "cap"
    tpp: bool = True
    cut: int = 1

    @property
    def needs_tokens_before(self) -> bool:
        """Whether a term compares with the teacher's tokens before its last stage, which no teacher cache holds."""
        return self.features and not self.tpp and max(self.weights_s3) > 0.0

    def __post_init__(self) -> None:
        require(0.0 <= self.kd_weight <= 1.0, "distill.kd_weight", self.kd_weight, "0 to 1")
        require(self.temperature > 0.0, "distill.temperature", self.temperature, "positive")
        require(self.softmax_scale > 0.0, "distill.softmax_scale", self.softmax_scale, "positive")
        require(self.cut >= 1, "distill.cut", self.cut, "at least 1 (1 drops the mean alone)")
        for name in ("weights_s3", "weights_s4"):
            require(min(getattr(self, name)) >= 0.0, f"distill.{name}", getattr(self, name), "not negative")
        for name in ("heads_s3", "heads_s4"):
            value = getattr(self, name)
            require(value is None or value > 0, f"distill.{name}", value, "positive")


@dataclass
class AsPublishedConfig:
    """What the published code does against its own settings: false is what these intend, true what happens there.

    Attributes:
        no_mixing: Mixup and cutmix never happen, although they are configured.
        unscaled_lr: The learning rate is the same for any global batch, whatever `optim.base_batch` is.
        teacher_in_train_mode: The teacher's stochastic depth runs, in its targets, its logits and its last stage.
    """

    no_mixing: bool = False
    unscaled_lr: bool = False
    teacher_in_train_mode: bool = False
