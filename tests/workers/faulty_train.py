"""launch/train.py with a fault built in on rank 1: `faulty_train.py FAULT ...`.

FAULT is `nan:STEP,STEP`, `hang:STEP`, `pause:STEP`, which sleeps for 10 seconds, or `stop:building`, which stops the process as
if its node were suspended. `limited-` before it lowers the limits of collectives of torch and DeepSpeed to 6 seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta

from scalekd_ds.errors import run_cli


def limit_collectives(seconds: float) -> None:
    """Lowers what DeepSpeed and torch take for a collective where nobody says otherwise, which are 10 and 30 minutes."""
    import functools

    import deepspeed
    from torch.distributed import distributed_c10d

    limit = timedelta(seconds=seconds)
    deepspeed.init_distributed = functools.partial(deepspeed.init_distributed, timeout=limit)
    distributed_c10d.default_pg_timeout = limit


def main() -> None:
    import torch
    from deepspeed import comm as dist
    from ranks import own_arguments

    from scalekd_ds.recipes.command_line import parse_run
    from scalekd_ds.training import setup, trainer

    fault, *args = own_arguments()
    if fault.startswith("limited-"):
        limit_collectives(6.0)
    kind, _, steps = fault.removeprefix("limited-").partition(":")
    at = {int(step) for step in steps.split(",")} if kind != "stop" else ()
    train_step, build_engine = trainer.train_step, setup.build_engine

    def stopped(*args):
        if dist.get_rank() == 1:
            # nobody else ends a process that is stopped
            subprocess.Popen(["sh", "-c", f"sleep 25; kill -9 {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return build_engine(*args)

    def faulty(run, batches):
        if dist.get_rank() != 1 or run.step not in at:
            return train_step(run, batches)
        if kind in ("hang", "pause"):
            time.sleep(1000 if kind == "hang" else 10)
            return train_step(run, batches)
        # what a broken image, or a loss that ran away, does to a step
        return train_step(run, ((images * torch.nan, labels) for images, labels in batches))

    trainer.train_step = faulty
    if kind == "stop":
        setup.build_engine = stopped
    cfg, _ = parse_run(args)
    trainer.train(cfg)


if __name__ == "__main__":
    run_cli(main)
