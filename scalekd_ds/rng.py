"""Seeds, saves and restores every random number generator of a process: Python's, NumPy's and PyTorch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """State of every random number generator of this process, as tensors and plain values that `torch.save` takes.

    Of the GPUs' generators it has the current device's, where this process computes on one: to ask for another's would start
    that GPU, and each rank draws from its own.
    """
    version, words, gauss = random.getstate()
    # a tuple, since legacy is its default
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state().cpu()] if torch.cuda.is_initialized() else [],
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned.

    What came from a GPU is for the current one; a process on CPUs leaves it. A GPU of which nothing was saved, since the run
    was on CPUs or saw fewer GPUs, keeps the state that the seed gave it.
    """
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized():
        saved = state["cuda"]
        # earlier releases saved every GPU that the process saw
        own = torch.cuda.current_device() if len(saved) > 1 else 0
        if own < len(saved):
            torch.cuda.set_rng_state(saved[own])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def seed_everything(seed: int) -> None:
    """Seeds every random number generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
