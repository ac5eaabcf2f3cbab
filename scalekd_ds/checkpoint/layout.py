"""The files of a checkpoint, and which checkpoints a run has.

run_dir/checkpoints/step00000500/
    shards_rank0.safetensors ...    parameters and optimizer, each rank its part, by the layers' names
    engine.json                     counters and schedule
    buffers.safetensors             what is not trained: statistics, frozen parameters
    rng_rank0.pt ...                generators of every rank
    student.safetensors             the bare student, BatchNorm statistics averaged over ranks
    student.json                    its card
    student_ema.*                   the same for its moving average, where the run keeps one
    state.json                      step, samples seen, world size, ZeRO stage
    manifest.json                   size and SHA-256 of every file above, written last

Any number of ranks and any ZeRO stage reads it. There is no pickle in it but torch's own of the generators, which is read
with `weights_only`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from scalekd_ds.checkpoint.manifest import MANIFEST
from scalekd_ds.errors import UserError

# names the newest checkpoint, so that a vanished one is an error and not a silent fresh start
LATEST = "latest.json"
# what a checkpoint exports, by the name that consolidate() takes
WEIGHTS = {"student": "student.safetensors", "ema": "student_ema.safetensors"}
BUFFERS = "buffers.safetensors"
_STEP = re.compile(r"step(\d{8})")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step*")
    return sorted(p for p in found if _STEP.fullmatch(p.name) and p.is_dir())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that `verify` has passed."""
    return json.loads((checkpoint / "state.json").read_text())


def resolve(path: Path) -> Path:
    """A checkpoint's folder from itself, or the newest of its run or of the run's checkpoints/.

    Raises:
        UserError: There is none.
    """
    if (path / MANIFEST).is_file() or _STEP.fullmatch(path.name):
        return path
    found = checkpoints_of(path.parent if path.name == "checkpoints" else path)
    if not found:
        raise UserError(f"{str(path)!r} holds no checkpoint: give runs/NAME or runs/NAME/checkpoints/stepNNNNNNNN.")
    return found[-1]
