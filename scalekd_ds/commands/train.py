"""Trains a student: `scalekd train --recipe NAME [--dotted.key value ...]`, alone or under the deepspeed launcher."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from scalekd_ds.cluster.ranks import free_port, rank_variables, shell_of_one_task, started_together
from scalekd_ds.commands.parser import Parser, examples_of
from scalekd_ds.commands.quiet import is_verbose, without_chatter
from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.names import escape, shell_word
from scalekd_ds.process import output, signals

# the module that the deepspeed launcher runs on every node
MODULE = "scalekd_ds.commands.train"
NEEDED = """most runs need these, and take the rest from their recipe:
  --recipe NAME    settings by name; scalekd recipes lists them
  --data.root DIR  images: train/ and val/, with a folder for each class
  --run.dir DIR    where checkpoints, logs and student.safetensors go
  --gpus N         processes on this machine; without it there is one"""
# not the `deepspeed` command, which may be that of another environment on PATH
LAUNCHER = (sys.executable, "-m", "scalekd_ds.commands.launcher")


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that start the deepspeed launcher, which then starts this verb once for each rank."""
    group = parser.add_argument_group("several processes: the deepspeed launcher, started for you")
    group.add_argument("--gpus", type=int, metavar="N", help="ranks on this machine, one a GPU (or processes on CPUs)")
    group.add_argument("--hostfile", "-H", metavar="FILE", help="the nodes, one `NAME slots=GPUS` a line")
    group.add_argument(
        "--deepspeed-args", default="", metavar="ARGS", help="further arguments of the launcher, in one string"
    )


def _epilog() -> str:
    """The end of the help, which is what a terminal shows of several hundred lines."""
    return f"{NEEDED}\n\n{examples_of('train')}"


def parser() -> argparse.ArgumentParser:
    """The parser of the run's fields and of the launcher's options."""
    from scalekd_ds.config.parser import run_parser

    return run_parser("scalekd train", add_launcher_arguments, _epilog())


def launcher_command(given: argparse.Namespace, run: list[str], module: str = MODULE) -> list[str]:
    """Words of the command that starts the launcher.

    Args:
        given: The launcher's options, of which `--gpus` or `--hostfile` is given.
        run: The run's command line arguments.
        module: The module of the verb that each rank runs.

    Raises:
        UserError: A hosts file that is not valid, fewer than one rank, options that exclude each other, or a process that
            a launcher has started itself.
    """
    try:
        extra_arguments = shlex.split(given.deepspeed_args)
    except ValueError as error:
        raise UserError(f"--deepspeed-args is {given.deepspeed_args!r}: {error}.") from None
    if given.gpus is not None and given.hostfile is not None:
        raise UserError(
            "--gpus and --hostfile are both given: the hosts file has the ranks of each node; leave --gpus out."
        )
    if "RANK" in os.environ:
        raise UserError("--gpus or --hostfile is given to a process that a launcher started: leave it out there.")
    tasks = started_together(os.environ)
    # one launcher a node, which srun starts on each, is what --no_ssh is for
    if tasks and not (given.hostfile and "--no_ssh" in extra_arguments):
        raise UserError(
            f"--gpus or --hostfile is given to each of {tasks.world_size} tasks, which {tasks.starter} has started: leave it "
            f"out, since the tasks are the ranks{shell_of_one_task(os.environ)}."
        )
    command = [*LAUNCHER]
    # what it says of each process that it starts is for those who look for a fault
    if not is_verbose() and not any(word.startswith(("--log_level", "--quiet")) for word in extra_arguments):
        command.append("--quiet")
    if given.hostfile is not None:
        from scalekd_ds.cluster.hosts import read_hosts

        hosts = read_hosts(given.hostfile)
        command += ["--hostfile", given.hostfile]
        if list(hosts) == ["localhost"]:
            # this machine needs no ssh server to reach itself
            command += ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        elif " " in os.getcwd():
            # DeepSpeed has the nodes' shells change to it, unquoted
            raise UserError(
                f"{os.getcwd()!r} has a blank, and DeepSpeed's launcher cannot start other nodes in such a folder: start "
                "from a folder without one."
            )
    else:
        if given.gpus < 1:
            raise UserError(f"--gpus is {given.gpus}: it must be at least 1.")
        # a port of its own, so that two jobs on one machine do not meet
        command += ["--num_accelerators", str(given.gpus), "--master_port", str(free_port())]
    return [*command, *extra_arguments, "--module", module, *run]


def launch(command: list[str]) -> int:
    """Runs the launcher, and returns its status."""
    from scalekd_ds.cluster.job import run_job

    sys.stdout.flush()
    status, number = run_job(command)
    if status < 0:
        # it was ended before there was a rank to say so
        raise signals.Interrupted(number or -status)
    return status


def main(argv: list[str] | None = None) -> int | None:
    """Returns the launcher's status where it starts one."""
    # parsed before the heavy imports, so that a typing error answers at once
    from scalekd_ds.recipes.command_line import parse_run

    launcher: Any = Parser(add_help=False)
    add_launcher_arguments(launcher)
    given, run = launcher.parse_known_args(argv)
    parsed = parse_run(run, "scalekd train", add_launcher_arguments, _epilog())
    if parsed is None:
        return None
    cfg, dump = parsed
    if dump is not None:
        from scalekd_ds.files.durable import write_json

        write_json(dump, cfg.as_dict())
        print(f"wrote {escape(dump)}: start it with --config {shell_word(dump)}")
        return None
    if given.gpus is not None or given.hostfile is not None:
        return launch(launcher_command(given, run))
    without_chatter()
    from scalekd_ds.cluster.launcher import abandonment

    output.goes_on("training")
    signals.outcome("no step was done, and nothing is lost")
    signals.watch(abandonment())
    # a wrong environment answers at once, too
    rank_variables(os.environ)
    if given.deepspeed_args:
        raise UserError("--deepspeed-args is given without --gpus or --hostfile: there is no launcher to take them.")
    if cfg.run.progress == "json":
        from scalekd_ds.watching.terminal.json_lines import claim_stdout

        # before DeepSpeed is imported, since it prints to standard output
        claim_stdout()
    from scalekd_ds.engine.processes import end_processes
    from scalekd_ds.training.trainer import train

    train(cfg)
    end_processes()
    return None


if __name__ == "__main__":
    run_cli(main)
