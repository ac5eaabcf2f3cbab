"""One run again and again from the same checkpoint, each time with another call of the file system that fails.

`failing_runs.py PLAN`: a JSON file with `begun`, the folder of a run that has been stopped; `arguments`, with which it goes
on in the folder `work`; and `faults`, a list of [number of the call, errno, whether all later calls fail]. For each the
worker writes a line of JSON to `told`: how the run ended, what it printed, and what is left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from failing_disk import FailingDisk
from safetensors.torch import load_file

from scalekd_ds.checkpoint.load import choose_checkpoint
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.checkpoint.plain_weights import consolidate
from scalekd_ds.errors import UserError, explained
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training.trainer import train


def left_in(run_dir: Path) -> dict[str, Any]:
    """What can be read of what is left; a damaged file under a final name is an error."""
    found: dict[str, Any] = {"damaged": []}
    for path in sorted(run_dir.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(run_dir).parts) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:
            found["damaged"].append(f"{path}: {error}")
    newest = choose_checkpoint(run_dir, "auto")
    verify(newest)
    consolidate(newest)
    found["newest"] = newest.name
    # those of the end before are kept beside, while the run goes on
    results = next(path for name in ("results", "results.before") if (path := run_dir / f"{name}.json").is_file())
    found["step"] = json.loads(results.read_text())["step"]
    return found


def one(plan: dict[str, Any], disk: FailingDisk) -> dict[str, Any]:
    run_dir = Path(plan["work"])
    cfg, _ = parse_run(plan["arguments"])
    before = os.fstat(2).st_size
    with disk():
        try:
            explained(lambda: train(cfg) and None)
            ended = "finished"
        except UserError as error:
            ended = f"line: {error}"
        except Exception:
            ended = traceback.format_exc()
    sys.stderr.flush()
    # the file is open for appending alone
    with open(f"/proc/self/fd/{2}") as file:
        file.seek(before)
        said = file.read()
    try:
        left = left_in(run_dir)
    except Exception:
        left = {"error": traceback.format_exc()}
    return {"ended": ended, "said": said, "left": left}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    begun, work = Path(plan["begun"]), Path(plan["work"])
    with open(plan["told"], "w") as told:
        for at, number, lasting in [(None, 0, False), *plan["faults"]]:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(begun, work)
            disk = FailingDisk(work.parent, at, number, lasting)
            found = one(plan, disk)
            call = disk.calls[at] if at is not None and at < len(disk.calls) else None
            found |= {"at": at, "errno": number, "lasting": lasting, "call": call, "calls": len(disk.calls)}
            if at is None:
                found["all"] = disk.calls
            elif plan.get("again"):
                # with the disk in order, the same command ends what the fault has cut
                found["again"] = one(plan, FailingDisk(work.parent))
            told.write(json.dumps(found) + "\n")
            told.flush()


if __name__ == "__main__":
    main()
