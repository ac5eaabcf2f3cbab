"""How a rank's share of the global batch is cut into micro batches, and whether BatchNorm can live with it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError


def micro_batch_notice(cfg: RunConfig, world_size: int, trained: nn.Module) -> str | None:
    """One line where the micro batch is smaller than asked for, or where a BatchNorm sees one image; else None.

    The one is since a rank's share has no larger divisor, the other because a rank has no more images.

    Args:
        cfg: The run.
        world_size: Number of ranks.
        trained: Student and projectors.

    Raises:
        UserError: The micro batch is one image only for that reason, and a BatchNorm would see that one image alone.
    """
    micro, accumulation = cfg.batches(world_size)
    share = cfg.global_batch_size // world_size
    # SyncBatchNorm sees the other ranks' images as well
    norms = [m for m in trained.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if micro >= min(cfg.micro_batch_size, share):
        alone = share == 1 < cfg.micro_batch_size and norms
        return (
            "a rank has one image of a step, of which BatchNorm takes its statistics: --student_sync_bn true takes them "
            "of all ranks' images, on GPUs"
            if alone and world_size > 1
            else None
        )
    even = -(-share // cfg.micro_batch_size) * cfg.micro_batch_size * world_size
    cut = (
        f"global_batch_size is {cfg.global_batch_size}, {share} images a rank, which has no divisor above {micro} up to "
        f"micro_batch_size {cfg.micro_batch_size}"
    )
    if micro == 1 and norms:
        raise UserError(
            f"{cut}: BatchNorm would take its statistics of one image. Choose --global_batch_size {even}, or "
            f"another one with such a divisor (or --micro_batch_size 1, if it shall be so)."
        )
    return f"{cut}: each step has {accumulation} micro batches of {micro}; --global_batch_size {even} has full ones"
