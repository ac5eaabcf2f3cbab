"""Mixup and cutmix on the device, by timm, as a pure function of (seed, step, micro batch, rank)."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup

from scalekd_ds.config import DataConfig
from scalekd_ds.errors import UserError

_STREAM = 0x313


class Mixer:
    """Mixes the images of a micro batch with each other in reverse order, and their labels with them.

    Label smoothing stays with the loss, which takes soft targets.

    Args:
        cfg: `mixup`, `cutmix`, `mix_probability`.
        num_classes: Width of the soft targets.
        micro_batch: Images in a batch.
        seed: The run's.
        rank: This rank; each mixes differently.

    Raises:
        UserError: An odd micro batch, whose middle image would be mixed with itself.
    """

    def __init__(self, cfg: DataConfig, num_classes: int, micro_batch: int, seed: int, rank: int) -> None:
        if micro_batch % 2:
            raise UserError(
                f"the micro batch has {micro_batch} images: data.mixup and data.cutmix need an even number; set "
                "--micro_batch_size or --global_batch_size."
            )
        self.key = (seed % 2**32, rank)
        self._mixup = Mixup(cfg.mixup, cfg.cutmix, None, cfg.mix_probability, 0.5, "batch", True, 0.0, num_classes)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, step: int, micro: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images (B, 3, H, W), in place, and soft targets (B, K).

        Args:
            images: (B, 3, H, W).
            labels: (B,) class indices.
            step: Optimizer step.
            micro: Micro batch in that step.
        """
        # timm draws from numpy's process-wide generator: lent to it for the call, with a seed of its own
        state = np.random.get_state()
        np.random.seed([*self.key, step, micro, _STREAM])
        try:
            return self._mixup(images, labels)
        finally:
            np.random.set_state(state)
