"""What `scalekd cache` is asked for beside the fields of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError
from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS, Store


@dataclass(frozen=True)
class CacheOptions:
    """What is cached, and where.

    Attributes:
        out: Folder of the cache.
        views: Number of views of each image.
        store: What tokens are held in.
        logits: The number of largest logits that are held, or `all`.
        dry_run: Says what the cache would take, and makes nothing.
    """

    out: Path
    views: int
    store: Store = STORES[0]
    logits: int | Literal["all"] = TOP_LOGITS
    dry_run: bool = False


def checked(cfg: RunConfig, options: CacheOptions) -> None:
    """Refuses a run that no cache can be made of.

    Raises:
        UserError: As it says.
    """
    if options.views < 1:
        raise UserError(f"--views is {options.views}: it must be at least 1.")
    if options.logits != "all" and options.logits < 1:
        raise UserError(f"--logits is {options.logits}: it must be at least 1, or all.")
    if cfg.teacher == "none":
        raise UserError("--teacher is none, and a cache is of a teacher's answers: give one, or a recipe that has one.")
    if cfg.teacher_cache is not None:
        raise UserError(
            "--teacher_cache is given to scalekd cache, which makes one: leave it out, and name the folder with --out."
        )
    if cfg.as_published.teacher_in_train_mode:
        raise UserError(
            "--as_published.teacher_in_train_mode is true, where the teacher answers otherwise each time: a cache holds one "
            "answer; set it to false."
        )
    if not cfg.distill.features and cfg.distill.kd_weight == 0.0:
        raise UserError(
            "--distill.features is false and --distill.kd_weight is 0: such a run takes nothing from its teacher, and there is "
            "nothing to cache."
        )
