"""Restarts a job that fails: `scalekd supervise --hostfile launch/hosts -- --recipe NAME --run.dir DIR ...`.

The doctor finds the nodes that can be used, and the deepspeed launcher starts the job on them. When a rank, a node or a link
fails, the job is started again from its last good checkpoint, on the nodes that then pass. After an error that only the user
can correct, it is not started again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from scalekd_ds.cluster.hosts import read_hosts
from scalekd_ds.cluster.job import run_job
from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.train import LAUNCHER, MODULE
from scalekd_ds.errors import UserError
from scalekd_ds.process import signals
from scalekd_ds.training.run_dir import make_run_dir


def parser() -> Parser:
    """The options of the supervisor itself; the arguments after `--` are those of the run."""
    options = Parser(
        "supervise",
        "Asks the doctor which nodes can be used, starts the job on them, and again from its last good checkpoint when a\n"
        "rank, a node or a link fails.",
    )
    options.add_argument(
        "--hostfile", "-H", required=True, metavar="FILE", help="the nodes, one `NAME slots=GPUS` a line"
    )
    options.add_argument("--max-restarts", type=int, default=5, metavar="N", help="restarts after the first start (5)")
    options.add_argument("--wait", type=float, default=20.0, metavar="S", help="seconds before a restart (20)")
    options.add_argument(
        "--deepspeed-args", default="", metavar="ARGS", help="further arguments of the launcher, in one string"
    )
    options.add_argument(
        "--doctor-args", default="", metavar="ARGS", help="further arguments of scalekd doctor, in one string"
    )
    options.add_argument("run", nargs=argparse.REMAINDER, help="after `--`: the arguments of scalekd train")
    return options


def select_nodes(hosts: dict[str, int], global_batch: int) -> dict[str, int]:
    """The longest start of the list of nodes that can share the global batch evenly; empty if there is none.

    Args:
        hosts: Node -> slots.
        global_batch: Images in an optimizer step.
    """
    names = list(hosts)
    for count in range(len(names), 0, -1):
        chosen = {name: hosts[name] for name in names[:count]}
        if global_batch % sum(chosen.values()) == 0:
            return chosen
    return {}


def passing_nodes(arguments: argparse.Namespace, run: list[str], report: Path) -> dict[str, int]:
    """Runs the doctor: node -> slots of the nodes that pass.

    Args:
        arguments: The supervisor's options.
        run: The run's command line arguments.
        report: Where the doctor writes its JSON.

    Raises:
        UserError: The doctor ended without a report.
    """
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scalekd_ds.commands.doctor", "--hostfile", arguments.hostfile, "--json", report]
    done = subprocess.run([*command, *shlex.split(arguments.doctor_args), *run], stdin=subprocess.DEVNULL)
    if not report.is_file():
        raise UserError(f"the doctor ended with status {done.returncode} and no report: what it said is above.")
    passing = json.loads(report.read_text())["passed"]
    return {name: slots for name, slots in read_hosts(arguments.hostfile).items() if name in passing}


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the run has finished, or was stopped by a signal."""
    from scalekd_ds.recipes.command_line import parse_run

    arguments = parser().parse_args(argv)
    run = arguments.run[1:] if arguments.run[:1] == ["--"] else arguments.run
    if arguments.max_restarts < 0 or arguments.wait < 0:
        raise UserError("--max-restarts and --wait must not be negative.")
    run = [*run, "--run.resume", "auto"]
    parsed = parse_run(run, "scalekd supervise")
    if parsed is None:
        return 0
    cfg, _ = parsed
    # a mistake in it answers at once, and not through the doctor
    read_hosts(arguments.hostfile)
    folder = make_run_dir(Path(cfg.run.dir).resolve()) / "supervisor"
    folder.mkdir(exist_ok=True)
    results = Path(cfg.run.dir) / "results.json"
    for start in range(arguments.max_restarts + 1):
        hosts = select_nodes(passing_nodes(arguments, run, folder / "doctor.json"), cfg.global_batch_size)
        if hosts:
            hostfile = folder / f"hosts.{start}"
            hostfile.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
            command: list[str | Path] = [*LAUNCHER, "--hostfile", hostfile, *shlex.split(arguments.deepspeed_args)]
            print(f"supervisor: start {start} on {', '.join(hosts)}", flush=True)
            before = results.stat().st_mtime_ns if results.exists() else None
            status, number = run_job([*command, "--module", MODULE, *run], stdin=subprocess.DEVNULL)
            if number is not None and status != 0:
                raise signals.Interrupted(number)
            if status == 0:
                finished = results.exists() and results.stat().st_mtime_ns != before
                print(
                    f"supervisor: {'finished' if finished else 'stopped by a signal; started again, it goes on'}",
                    flush=True,
                )
                return 0
            if status == UserError.status:
                raise UserError(
                    f"the run ended with an error that a restart cannot mend (status {status}): it is above."
                )
            problem = f"the job ended with status {status}"
        else:
            problem = f"no nodes that pass can share the global batch of {cfg.global_batch_size} evenly"
        left = arguments.max_restarts - start
        print(f"supervisor: {problem}; {left} restart(s) left", file=sys.stderr, flush=True)
        if left:
            time.sleep(arguments.wait)
    raise UserError(f"{arguments.max_restarts} restarts did not help: look at the messages above, then start it again.")
