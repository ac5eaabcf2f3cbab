"""Two runs' checkpoints, one run after the other in the same ranks, where rank 1 is slower than rank 0 to write its file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from deepspeed import comm as dist
from ranks import begin, tell

from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.engine.processes import job_store


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder, found = begin(parser).folder, {}
    for run in ("first", "second"):
        saver = Saver(folder / run, keep_last=1, keep_best=0, store=job_store())

        def write(partial: Path) -> None:
            time.sleep(2.0 * dist.get_rank())
            (partial / f"rank{dist.get_rank()}").write_text("whole")

        final = saver.start(1, lambda write=write: write)
        saver.finish()
        found[run] = sorted(json.loads((final / "manifest.json").read_text())["files"])
        dist.barrier()
    tell(found)


if __name__ == "__main__":
    main()
