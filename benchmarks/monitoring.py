#!/usr/bin/env python3
"""What watching a run costs: steps of one process, watched and logged as by default, and not, in turn.

`python benchmarks/monitoring.py --recipe fashion-scalekd --data.root DIR`, with any arguments of launch/train.py. A round is
`--run.log_every` steps of each kind, one of this, one of that, the last watched one logged. On a CPU the processor's seconds
are compared beside those of the clock, which other programs on a busy machine disturb.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from scalekd_ds.errors import run_cli

Seconds = tuple[float, float]


def measure(arguments: list[str], rounds: int) -> tuple[str, list[tuple[Seconds, Seconds]]]:
    """The kind of device, and (watched, not watched) of each round: seconds of the clock and of the processor."""
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

    def wait() -> None:
        if run.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def one(on: bool, logged: bool) -> Seconds:
        """A step of either kind, with what follows a logged one."""
        # a run has one watch from its start to its end
        with watch if on else nullcontext():
            wait()
            begin, cpu = time.perf_counter(), time.process_time()
            if on:
                watch.expect(logged)
            losses = train_step(run, batches)
            run.step += 1
            if on:
                reporter.step(run.step)
            if on and logged:
                scalars = watch.scalars(losses)
                run.monitor.log(run.step, scalars)
                reporter.scalars(run.step, scalars)
            wait()
            return time.perf_counter() - begin, time.process_time() - cpu

    def one_round() -> tuple[Seconds, Seconds]:
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for step in range(steps):
            for on in (True, False) if step % 2 else (False, True):
                for position, seconds in enumerate(one(on, step == steps - 1)):
                    sums[on][position] += seconds
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
