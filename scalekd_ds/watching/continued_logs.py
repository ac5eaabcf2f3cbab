"""Makes the logs of a run that is started several times read as those of one run.

A start that goes on from an earlier checkpoint trains steps again: what was logged of them before is taken back.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from scalekd_ds.files.durable import write_json, written_aside


def continue_tensorboard(writer: Any, step: int) -> None:
    """Tells TensorBoard to drop what it has of the steps after `step`; call it before anything else is written.

    As SummaryWriter(purge_step=...) does, which DeepSpeed's monitor does not pass on.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
        writer.file_writer.add_event(event, step + 1)


def continue_csv(monitor: Any, step: int) -> None:
    """Cuts what earlier starts wrote after `step` from the files of DeepSpeed's monitor, and adds no second header to them."""
    for path in Path(monitor.log_dir).glob("*.csv"):
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        # a kill may have cut the last row, and DeepSpeed writes a header at every start
        kept = [row for row in rows if row.endswith("\n") and row.split(",")[0].isdecimal()]
        with written_aside(path) as partial:
            partial.write_text("".join([header, *(row for row in kept if int(row.split(",")[0]) <= step)]))
        if header:
            monitor.filenames.append(path.stem)


def continue_wandb(run_dir: Path) -> None:
    """Gives wandb the run's own id, with which a resumed run goes on as the same one; one that the user has set stays."""
    if "WANDB_RUN_ID" in os.environ:
        return
    path = run_dir / "wandb_id.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    os.environ["WANDB_RUN_ID"] = json.loads(path.read_text())["id"]
    os.environ.setdefault("WANDB_RESUME", "allow")
