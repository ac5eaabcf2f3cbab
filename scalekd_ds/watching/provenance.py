"""Records what a run was made from: its command, commit, configuration and pairing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from scalekd_ds.config import RunConfig
from scalekd_ds.names import escape, shell_word

# fields that change the speed of a run and not its results
_SPEED_FIELDS = {
    f"data.{name}" for name in "threads prefetch keep_mb hw_decoder_load largest_image eval_batch_size".split()
}


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of the git checkout that holds `folder`, with `, changed` if tracked files differ; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy of this file may lie, untracked, in the checkout of another project
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + (", changed" if changed else "")


def command_line() -> str:
    """The command line of this process, quoted for a shell, with each flag on a line of its own."""
    words = [Path(sys.executable).name, *sys.argv]
    return "".join((" \\\n    " if word.startswith("--") else " ") + shell_word(word) for word in words).strip()


def summary(cfg: RunConfig, pairing: str, world_size: int, device: torch.device) -> str:
    """The run's summary in Markdown: command, commit, versions, pairing and the whole configuration.

    Args:
        cfg: The run.
        pairing: The table of the pairing, as plain text.
        world_size: Number of ranks.
        device: The device of this rank.
    """
    import deepspeed

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {
        "recipe": cfg.recipe or "none",
        "commit": git_commit() or "not a git checkout",
        "ranks": f"{world_size} x {name}",
        "versions": f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, Python {platform.python_version()}",
    }
    table = "\n".join(f"| {key} | {escape(value)} |" for key, value in facts.items())

    def block(text: str) -> str:
        return "\n".join(f"    {line}" for line in text.splitlines())

    return (
        f"{block(command_line())}\n\n| | |\n|---|---|\n{table}\n\n{block(pairing)}\n\n"
        f"{block(json.dumps(cfg.as_dict(), indent=1))}\n"
    )


def hyperparameters(cfg: RunConfig) -> dict[str, bool | str | float]:
    """A run's hyperparameters as flat `group.field` values, for TensorBoard's table of runs.

    The fields of `run` and those that change the speed alone are left out.
    """

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value if isinstance(value, bool | int | float) else escape(str(value))
        return found

    values = flat({key: value for key, value in cfg.as_dict().items() if key != "run"})
    return {name: value for name, value in values.items() if name not in _SPEED_FIELDS}
