"""Checks whether a job can start on the nodes of a hosts file.

`scalekd doctor --hostfile launch/hosts [--recipe NAME --dotted.key value ...]`
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from scalekd_ds.commands.parser import Parser
from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.names import escape


def parser() -> Parser:
    """The options of the doctor itself; all other arguments are those of the run."""
    from scalekd_ds.cluster.doctor.checks import Limits

    options = Parser(
        "doctor",
        "Looks at every node of a hosts file before a job: one line a problem, and status 1 if there is any.",
        "--recipe NAME, and any field of a run as --dotted.key value: its data and weights are looked for on the nodes.",
    )
    options.add_argument("--hostfile", "-H", metavar="FILE", help="the nodes, one `NAME slots=GPUS` a line")
    options.add_argument("--ssh-port", type=int, metavar="PORT", help="where the nodes' sshd listens")
    options.add_argument(
        "--ssh",
        metavar="COMMAND",
        help="instead of ssh: takes a node's name, or has {host} for it, and then a command for the node's shell",
    )
    options.add_argument(
        "--write-env",
        nargs="+",
        metavar="NAME=VALUE",
        help="first write these variables into .deepspeed_env, from which the launcher exports them on every node",
    )
    options.add_argument(
        "--skip", nargs="+", choices=("bandwidth", "all-reduce"), default=[], help="leave these checks out"
    )
    options.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="seconds for the all-reduce, from the moment when its ranks have loaded torch (20 on CPUs, 60 on GPUs, and half "
        "a second for each node)",
    )
    options.add_argument("--json", metavar="FILE", help="also write the whole report as JSON, with the nodes that pass")
    defaults = Limits()
    for flag, field, what in (
        ("memory", "memory", "GiB of free memory a slot"),
        ("disk", "disk", "GiB of free disk where the run's folder goes"),
        ("gpu-free", "gpu_free", "share of each GPU's memory that is free"),
        ("bandwidth", "bandwidth", "Gbit/s from each node to the next, 0 for any"),
    ):
        default = getattr(defaults, field)
        options.add_argument(
            f"--min-{flag}", dest=field, type=float, default=default, metavar="X", help=f"{what} ({default:g})"
        )
    options.add_argument(
        "--max-skew",
        dest="skew",
        type=float,
        default=defaults.skew,
        metavar="S",
        help=f"seconds by which clocks may differ ({defaults.skew:g})",
    )
    return options


def ssh_command(hosts: dict[str, int], command: str | None, port: int | None) -> list[str]:
    """Words of the command that reaches a node; empty for this machine itself, where the launcher uses no ssh either.

    Args:
        hosts: Node -> slots.
        command: `--ssh`, or None for ssh.
        port: `--ssh-port`, or None for ssh's own.

    Raises:
        UserError: `command` is empty, or cannot be split into words.
    """
    if command is not None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UserError(f"--ssh is {command!r}: {error}.") from None
        if not words:
            raise UserError("--ssh is empty: leave it out for ssh.")
        return words
    if list(hosts) == ["localhost"]:
        return []
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]
    return ["ssh", *options, *(["-p", str(port)] if port is not None else [])]


def required_paths(run: list[str]) -> tuple[dict[str, str], str]:
    """(key -> path of the data and weights that a run reads on every node, the run's folder).

    Args:
        run: The run's command line arguments.

    Raises:
        UserError: The arguments are no valid run.
    """
    from scalekd_ds.data.sources.shards import shards_of_pattern
    from scalekd_ds.recipes.command_line import parse_run

    parsed = parse_run(run, "scalekd doctor")
    if parsed is None:
        raise SystemExit(0)
    cfg, _ = parsed
    paths: dict[str, Any] = {}
    if cfg.data.root:
        for key, name in (("data.train", cfg.data.train), ("data.val", cfg.data.val)):
            if not name.startswith("hf:"):
                shards = shards_of_pattern(os.path.join(cfg.data.root, name), key)
                # a folder that was copied halfway lacks its last shards
                paths |= (
                    {key: shards[0]} if len(shards) == 1 else {f"{key} (first)": shards[0], f"{key} (last)": shards[-1]}
                )
    # values that are no files are names of timm models
    for key in ("teacher", "teacher_weights", "student_weights"):
        value = getattr(cfg, key)
        if isinstance(value, str) and os.path.isfile(value):
            paths[key] = value
    if cfg.teacher_cache is not None:
        paths["teacher_cache"] = cfg.teacher_cache
    return paths, cfg.run.dir


def main(argv: list[str] | None = None) -> int:
    """Returns status 1 if there is any problem, else 0."""
    from scalekd_ds.cluster.doctor.checks import Limits
    from scalekd_ds.cluster.env_file import env_paths, exported, parse_assignments, write_env
    from scalekd_ds.cluster.hosts import read_hosts

    arguments, run = parser().parse_known_args(argv)
    here = Path.cwd()
    if arguments.write_env:
        path = env_paths(here)[-1]
        exported_values = write_env(path, parse_assignments(arguments.write_env, "--write-env"))
        print(
            f"wrote {escape(path)}: the launcher, started in this folder, exports {', '.join(exported_values)} on every node"
        )
    if arguments.hostfile is None:
        if arguments.write_env:
            return 0
        raise UserError(
            "no --hostfile is given: launch/hosts, or a file of your own with one `NAME slots=GPUS` a line."
        )
    if arguments.timeout is not None and not 1 <= arguments.timeout <= 3600:
        raise UserError(f"--timeout is {arguments.timeout:g}: it must be 1 to 3600 seconds.")
    limits = Limits(**{name: getattr(arguments, name) for name in ("memory", "disk", "gpu_free", "skew", "bandwidth")})
    for name, value in vars(limits).items():
        if not 0 <= value < float("inf"):
            raise UserError(f"the limit for {name} is {value}: it must not be negative.")
    hosts = read_hosts(arguments.hostfile)
    data, run_dir = required_paths(run)
    ssh = ssh_command(hosts, arguments.ssh, arguments.ssh_port)

    from rich.console import Console

    from scalekd_ds.cluster.doctor.examine import examine
    from scalekd_ds.cluster.doctor.report import print_report

    report = examine(hosts, ssh, exported(here), data, run_dir, limits, arguments.skip, arguments.timeout)
    # rich takes 80 columns for a file, where the table would wrap
    print_report(Console(width=None if sys.stdout.isatty() else 200), report)
    if arguments.json:
        from scalekd_ds.files.durable import write_json

        write_json(Path(arguments.json), report.as_dict())
    return 1 if report.problems else 0


if __name__ == "__main__":
    run_cli(main)
