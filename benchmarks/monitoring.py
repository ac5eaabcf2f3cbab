#!/usr/bin/env python3
"""Measures what watching a run costs: steps that are watched and logged as by default alternate with steps that are not.

`python benchmarks/monitoring.py --recipe fashion-scalekd --data.root DIR`, with any arguments of launch/train.py. A round has
`--run.log_every` steps of each kind, and its last watched step is logged. On a CPU the processor's time is compared too, since
other programs disturb the wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from scalekd_ds.errors import run_cli

# wall time and processor time
Seconds = tuple[float, float]


def measure(arguments: list[str], rounds: int) -> tuple[str, list[tuple[Seconds, Seconds]]]:
    """Runs the rounds.

    Args:
        arguments: Command line arguments of the run.
        rounds: Number of rounds.

    Returns:
        The type of the device, and (seconds of watched steps, seconds of others) of each round.
    """
    from scalekd_ds.recipes.command_line import parse_run
    from scalekd_ds.training.setup import build
    from scalekd_ds.training.step import train_step
    from scalekd_ds.training.watch import Watch
    from scalekd_ds.watching.terminal import reporter_for

    cfg, _ = parse_run(arguments)
    run = build(cfg)
    batches, steps = iter(run.train_loader), cfg.run.log_every
    reporter = reporter_for("plain", 0, run.total_steps, 0)
    run.engine.train()

    def synchronise() -> None:
        if run.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def time_step(watched: bool, logged: bool) -> Seconds:
        """Seconds of one step, with logging after it if it is a watched one."""
        with watch if watched else nullcontext():
            synchronise()
            begin, cpu = time.perf_counter(), time.process_time()
            if watched:
                watch.expect(logged)
            losses = train_step(run, batches)
            run.step += 1
            if watched:
                reporter.step(run.step)
            if watched and logged:
                scalars = watch.scalars(losses)
                run.monitor.log(run.step, scalars)
                reporter.scalars(run.step, scalars)
            synchronise()
            return time.perf_counter() - begin, time.process_time() - cpu

    def one_round() -> tuple[Seconds, Seconds]:
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for step in range(steps):
            for watched in (True, False) if step % 2 else (False, True):
                for position, seconds in enumerate(time_step(watched, step == steps - 1)):
                    sums[watched][position] += seconds
        return tuple(sums[True]), tuple(sums[False])

    watch = Watch(run)
    one_round()
    found = [one_round() for _ in range(rounds)]
    run.train_loader.close()
    return run.device.type, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    own, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        kind, rounds = measure([*arguments, "--run.dir", str(Path(folder) / "run")], own.rounds)
    for position, clock in enumerate(("clock", "processor") if kind == "cpu" else ("clock",)):
        seconds = [(on[position], off[position]) for on, off in rounds]
        ratios = sorted(100.0 * (on / off - 1.0) for on, off in seconds)
        low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.5, 0.8))
        on, off = (statistics.median(values) for values in zip(*seconds, strict=True))
        print(
            f"{clock}: watched {on:.3f} s a round, not {off:.3f} s: {middle:+.2f}% (p20 to p80: {low:+.2f} to {high:+.2f})"
        )


if __name__ == "__main__":
    run_cli(main)
