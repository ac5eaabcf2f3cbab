"""Runs and commands to which a test sends signals."""

from __future__ import annotations

import tiny_run


def arguments(data, run_dir, *more):
    slim = ("--student_kwargs.channels", "[8, 8, 8, 8]", "--micro_batch_size", 4)
    slim += ("--run.log_every", 1, "--run.eval_every", 1, "--run.pictures", 1, "--data.eval_batch_size", 4)
    return tiny_run.supervised_arguments(data, run_dir, *slim, *more)
