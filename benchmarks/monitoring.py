#!/usr/bin/env python3
"""What watching a run costs: steps of one process, watched and logged as by default, and not, in turn.

`python benchmarks/monitoring.py --recipe fashion-scalekd --data.root DIR`, with any arguments of launch/train.py. A round is
`--run.log_every` steps of each kind; which comes first changes from round to round. On a CPU the processor's seconds are
compared beside those of the clock, which other programs on a busy machine disturb.
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
    from scalekd_ds.cli import parse_run
    from scalekd_ds.run import build
    from scalekd_ds.terminal import reporter_for
    from scalekd_ds.trainer import train_step
    from scalekd_ds.watch import Watch

    cfg, _ = parse_run(arguments)
    run = build(cfg)
    batches, steps = iter(run.train_loader), cfg.run.log_every
    reporter = reporter_for("plain", 0, run.total_steps, 0)
    run.engine.train()

    def wait() -> None:
        if run.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def watched(watch: Watch) -> None:
        for step in range(steps):
            watch.expect(step == steps - 1)
            losses = train_step(run, batches)
            run.step += 1
            reporter.step(run.step)
        scalars = watch.scalars(losses)
        run.monitor.log(run.step, scalars)
        reporter.scalars(run.step, scalars)

    def timed(on: bool) -> Seconds:
        wait()
        # a run has one watch from its start to its end
        with watch if on else nullcontext():
            begin, cpu = time.perf_counter(), time.process_time()
            if on:
                watched(watch)
            else:
                for _ in range(steps):
                    train_step(run, batches)
                    run.step += 1
            wait()
            return time.perf_counter() - begin, time.process_time() - cpu

    watch = Watch(run)
    for on in (True, False):
        timed(on)
    found = []
    for number in range(rounds):
        order = (True, False) if number % 2 == 0 else (False, True)
        took = {on: timed(on) for on in order}
        found.append((took[True], took[False]))
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
