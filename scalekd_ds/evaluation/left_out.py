"""Judges the validation images that cannot be used: a few are left out and counted, many end the run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from deepspeed import comm as dist

from scalekd_ds.data import EvalLoader
from scalekd_ds.data.bad_files import most_bad
from scalekd_ds.errors import UserError

# images that a message names
_MAX_NAMED = 5


class LeftOutError(UserError):
    """Too many validation images cannot be used; every rank raises it, with the same message."""


def check_left_out(loader: EvalLoader, accuracy: dict[str, Any], max_share: float, flag: str, told: int = 0) -> None:
    """Names the images that an evaluation has left out, in one line on stderr of rank 0; collective.

    Args:
        loader: This rank's loader, after the evaluation.
        accuracy: What the evaluation has returned, over all ranks.
        max_share: Largest share of all validation images that may be left out, rounded up to an image.
        flag: The setting that has this share, for the message.
        told: How many were left out when this was last said; the same number is not said again.

    Raises:
        LeftOutError: More are left out, or no image can be used at all.
    """
    count, total = accuracy["left_out"], accuracy["images"] + accuracy["left_out"]
    if not count:
        return
    found: list[tuple[dict[str, str], str | None]] = [
        ({loader.source.name(i): reason for i, reason in sorted(loader.left_out.items())}, loader.storage_gone)
    ]
    if dist.is_initialized() and dist.get_world_size() > 1:
        own, found = found[0], [({}, None)] * dist.get_world_size()
        torch.distributed.all_gather_object(found, own)
    if gone := next((problem for _, problem in found if problem), None):
        raise LeftOutError(gone)
    reasons = {name: reason for of_rank, _ in found for name, reason in of_rank.items()}
    named = "; ".join(f"{name} {reason}" for name, reason in sorted(reasons.items())[:_MAX_NAMED])
    more = f", and {count - _MAX_NAMED} more" if count > _MAX_NAMED else ""
    if not accuracy["images"]:
        raise LeftOutError(f"none of the {total} validation images can be used: {named}{more}.")
    said = f"{count} of {total} validation images cannot be used"
    if count > most_bad(max_share, total):
        raise LeftOutError(
            f"{said}, more than {flag} {max_share:g} allows: {named}{more}. Mend or remove them; `scalekd prepare-data "
            "verify DIR` finds them all."
        )
    if count != told and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"warning: {said}, and are left out of top-1 and top-5: {named}{more}", file=sys.stderr, flush=True)
