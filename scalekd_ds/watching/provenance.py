"""Where a run comes from, for whoever looks at it later: command, commit, configuration, pairing."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from scalekd_ds.config import RunConfig

_SPEED = {f"data.{name}" for name in "threads prefetch keep_mb hw_decoder_load largest_image eval_batch_size".split()}


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Hash of the checkout that holds `folder`, with `, changed` where tracked files differ; None outside a checkout."""

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

    # an installed copy may lie, untracked, in a checkout of something else
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + (", changed" if changed else "")


def command_line() -> str:
    """This process's, as a shell would take it, a flag a line."""
    words = [Path(sys.executable).name, *sys.argv]
    return "".join((" \\\n    " if word.startswith("--") else " ") + shlex.quote(word) for word in words).strip()


def summary(cfg: RunConfig, pairing: str, world_size: int, device: torch.device) -> str:
    """Markdown: command, commit, versions, pairing table and the whole configuration."""
    import deepspeed

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {
        "recipe": cfg.recipe or "none",
        "commit": git_commit() or "not a git checkout",
        "ranks": f"{world_size} x {name}",
        "versions": f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, Python {platform.python_version()}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())

    def block(text: str) -> str:
        return "\n".join(f"    {line}" for line in text.splitlines())

    return (
        f"{block(command_line())}\n\n| | |\n|---|---|\n{table}\n\n{block(pairing)}\n\n"
        f"{block(json.dumps(cfg.as_dict(), indent=1))}\n"
    )


def hyperparameters(cfg: RunConfig) -> dict[str, bool | str | float]:
    """The science of a run as flat `group.field` values, for TensorBoard's table of runs; what changes speed alone is left
    out."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
        return found

    values = flat({key: value for key, value in cfg.as_dict().items() if key != "run"})
    return {name: value for name, value in values.items() if name not in _SPEED}
