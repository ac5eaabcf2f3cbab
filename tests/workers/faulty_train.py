"""launch/train.py with a fault built in: `faulty_train.py FAULT ...`, FAULT being `nan:STEP,STEP` or `hang:STEP`, on rank 1."""

from __future__ import annotations

import time

from scalekd_ds.errors import run_cli


def main() -> None:
    import torch
    from deepspeed import comm as dist
    from ranks import own_arguments

    from scalekd_ds.recipes.command_line import parse_run
    from scalekd_ds.training import trainer

    fault, *args = own_arguments()
    kind, _, steps = fault.partition(":")
    at = {int(step) for step in steps.split(",")}
    train_step = trainer.train_step

    def faulty(run, batches):
        if dist.get_rank() != 1 or run.step not in at:
            return train_step(run, batches)
        if kind == "hang":
            time.sleep(1000)
        # what a broken image, or a loss that ran away, does to a step
        return train_step(run, ((images * torch.nan, labels) for images, labels in batches))

    trainer.train_step = faulty
    cfg, _ = parse_run(args)
    trainer.train(cfg)


if __name__ == "__main__":
    run_cli(main)
