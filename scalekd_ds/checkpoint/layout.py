"""The files of a checkpoint, and the checkpoints of a run.

run_dir/checkpoints/step00000500/
    shards_rank0.safetensors ...    master weights and optimizer states of each rank's shards, by the layers' names
    engine.json                     counters, schedule, scalars of the optimizer
    buffers.safetensors             what is not trained: statistics, frozen parameters
    rng_rank0.pt ...                random generators of each rank
    student.safetensors             the student alone, BatchNorm statistics averaged over ranks
    student.json                    its card
    student_ema.*                   the same two for its moving average, where the run keeps one
    state.json                      step, samples seen, world size, ZeRO stage
    manifest.json                   size and SHA-256 of every file above, written last
    zero_to_fp32.py                 says how to get the student, to whoever knows DeepSpeed's script of this name

Any number of ranks can read it, at any ZeRO stage. Its only pickles are torch's files of the generators, which are read
with `weights_only`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scalekd_ds.checkpoint.manifest import MANIFEST
from scalekd_ds.errors import UserError
from scalekd_ds.models.card import read_evaluation

T = TypeVar("T")
# names the newest checkpoint, so that a run whose newest checkpoint is missing fails instead of starting afresh
LATEST = "latest.json"
# files of plain weights in a checkpoint, by the name that consolidate() takes
WEIGHTS = {"student": "student.safetensors", "ema": "student_ema.safetensors"}
BUFFERS = "buffers.safetensors"
_STEP = re.compile(r"step(\d{8})")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The folders of a run's finished checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step*")
    return sorted(p for p in found if _STEP.fullmatch(p.name) and p.is_dir())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that `verify` has passed, with what was measured after it was saved.

    Raises:
        UserError: The accuracies, or the state, are damaged.
    """
    return json.loads((checkpoint / "state.json").read_text()) | read_evaluation(checkpoint).get("state", {})


def step_in_name(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None where somebody has given it another name."""
    found = _STEP.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the newest in `path`, a run's folder or its checkpoints/.

    Raises:
        UserError: There is no checkpoint.
    """
    if (path / MANIFEST).is_file() or _STEP.fullmatch(path.name):
        return path
    found = checkpoints_of(path.parent if path.name == "checkpoints" else path)
    if not found:
        raise UserError(f"{str(path)!r} holds no checkpoint: give runs/NAME or runs/NAME/checkpoints/stepNNNNNNNN.")
    return found[-1]


def of_checkpoint(path: Path, use: Callable[[Path], T]) -> T:
    """What `use` returns for the checkpoint that `path` stands for; for a newer one where a run has deleted it meanwhile.

    Raises:
        UserError: There is no checkpoint.
    """
    while True:
        checkpoint = resolve_checkpoint(path)
        try:
            return use(checkpoint)
        except (UserError, OSError):
            if checkpoint.is_dir() or resolve_checkpoint(path) == checkpoint:
                raise


def read_latest(latest: Path) -> str | None:
    """The name of the checkpoint that `latest` names as the newest; None where there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    if not latest.exists():
        return None
    try:
        name = json.loads(latest.read_text())["checkpoint"]
        if not isinstance(name, str) or not _STEP.fullmatch(name):
            raise ValueError(f"it names {json.dumps(name):.60}, which is no checkpoint")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{latest} is damaged ({error}): give the checkpoint as --run.resume PATH.") from None
    return name
