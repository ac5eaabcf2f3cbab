"""Mixup and cutmix on the device: timm's, with draws that are a pure function of (seed, step, micro batch, rank)."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup

from scalekd_ds.config import DataConfig
from scalekd_ds.errors import UserError

# keeps these draws apart from others that are made with the same seed
_STREAM = 0x313


class Mixer:
    """Mixes each image of a micro batch with the one at the mirrored position, and their labels in the same proportion.

    Label smoothing is left to the loss, which takes soft targets.

    Args:
        cfg: `mixup`, `cutmix`, `mix_probability`.
        num_classes: Width of the soft targets.
        micro_batch: Images in a batch.
        seed: The run's seed.
        rank: This rank; each rank draws differently.

    Raises:
        UserError: The micro batch is odd, so its middle image would be mixed with itself.
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
        """Mixes a micro batch.

        Args:
            images: (B, 3, H, W), which are changed in place.
            labels: (B,) class indices.
            step: Optimizer step.
            micro: Number of the micro batch in that step.

        Returns:
            The mixed images (B, 3, H, W) and soft targets (B, K).
        """
        # timm draws from numpy's global generator: it is seeded for this call, and its state is put back afterwards
        state = np.random.get_state()
        np.random.seed([*self.key, step, micro, _STREAM])
        try:
            return self._mixup(images, labels)
        finally:
            np.random.set_state(state)
