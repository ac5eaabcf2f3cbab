"""Float32 without TF32, in which models are evaluated."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Generator[None]:
    """Has cuDNN's convolutions keep all bits of their factors, where PyTorch's default is TF32.

    Matrix products are without TF32 by PyTorch's default, and keep what the caller has set.
    """
    # settings that PyTorch makes when it is imported
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, cudnn.rnn)
    before = [each.fp32_precision for each in settings]
    try:
        # the older of PyTorch's two settings sets both kinds, and reading it is an error where they disagree with it
        cudnn.allow_tf32 = False
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        cudnn.allow_tf32 = "tf32" in before
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision
