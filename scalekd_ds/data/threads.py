"""How many threads read, decode and augment a rank's images. Batches do not depend on it."""

from __future__ import annotations

import os

import torch

from scalekd_ds.cluster.ranks import cores_of_this_rank
from scalekd_ds.config import DataConfig

# what is taken unasked: eight threads apply RandAugment to 4,700 images/s; beside a GPU, which does that itself, they read
# files and draw
_LEAST, _MOST = 2, 8
# a GPU's decoder keeps 0.2 GB of its memory for each thread
_MOST_BESIDE_A_GPU = 4


def pool_threads(cfg: DataConfig) -> int:
    """`data.threads`, or where that is None the cores that this rank has on its node, but one for the training itself."""
    if cfg.threads is not None:
        return cfg.threads
    # a verb that runs alone may find the variables of another job, and a process group may be begun without any
    has_ranks = torch.distributed.is_initialized() and os.environ.get("WORLD_SIZE")
    cores = cores_of_this_rank(os.environ) if has_ranks else len(os.sched_getaffinity(0))
    return min(max(_LEAST, cores - 1), _MOST)


def decoder_threads(cfg: DataConfig, on_gpu: bool) -> int:
    """Threads of DALI: as many as of the pool, but for what a GPU's decoder would keep of its memory unasked."""
    threads = pool_threads(cfg)
    return min(threads, _MOST_BESIDE_A_GPU) if on_gpu and cfg.threads is None else threads
