"""Real steps as a user trains: DeepSpeed's engine and the DALI pipeline on JPEGs, kill, resume, consolidate, evaluate.

One run goes straight to its end, through the deepspeed launcher. Another one is killed by SIGKILL half-way, and started again.
Losses and weights of both are compared, with `--run.deterministic true` first and then without it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file

from gpu_parts import commands
from gpu_parts.images import make_folder
from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.config import RunDirConfig

SCALEKD = (sys.executable, "-m", "scalekd_ds")
# of a start on a machine that has just begun, and of the steps
_SECONDS_A_RUN = 40.0
_TINY_SWIN = {"img_size": 32, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        steps: Of a whole run.
        save_every: Steps between two checkpoints; the run is killed after the one half-way.
        arguments: Of `scalekd train`, besides folders.
        distinct, copies, pixels: JPEGs, the names of each, and their width and height.
    """

    steps: int
    save_every: int
    arguments: tuple
    distinct: int
    copies: int
    pixels: tuple[int, int]


FULL = Sizes(
    200,
    50,
    (
        *("--recipe", "swin_s-resnet50-traditional", "--teacher_weights", "none", "--teacher_kwargs.num_classes", 10),
        *("--student_weights", "none", "--global_batch_size", 64, "--micro_batch_size", 64, "--schedule.epochs", 10),
        *("--data.threads", 8, "--run.ds_config", "zero1", "--run.eval_every", 5),
    ),
    128,
    10,
    (500, 400),
)
SMALL = Sizes(
    8,
    2,
    (
        *("--recipe", "fashion-scalekd", "--data.train_images", "null", "--teacher", "swin_tiny_patch4_window7_224"),
        *("--teacher_weights", "none", "--teacher_kwargs", json.dumps(_TINY_SWIN | {"num_classes": 10})),
        *("--student_kwargs", json.dumps(_TINY_RESNET), "--global_batch_size", 8, "--micro_batch_size", 4),
        *("--schedule.epochs", 2, "--schedule.warmup_epochs", 0, "--data.random_crop", "true"),
    ),
    16,
    2,
    (40, 32),
)


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if a command fails, or runs that must agree do not."""
    sizes, end = SMALL if dry else FULL, time.monotonic() + seconds - 15.0
    found: dict[str, Any] = {"steps": sizes.steps, "arguments": list(map(str, sizes.arguments)), "exactness": {}}
    has_switch = "deterministic" in {field.name for field in dataclasses.fields(RunDirConfig)}
    settings = {"deterministic": ("--run.deterministic", "true")} if has_switch else {}
    if not (dry and settings):
        settings["as it comes"] = ()
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        data = Path(made) / "data"
        make_folder(data / "train", sizes.distinct, sizes.copies, sizes.pixels)
        make_folder(data / "val", sizes.distinct, 1, sizes.pixels)
        for name, more in settings.items():
            if end - time.monotonic() < (0 if dry else 3 * _SECONDS_A_RUN):
                found["exactness"][name] = {"not started": f"{end - time.monotonic():.0f} s left"}
                continue
            runs = Path(made) / name.replace(" ", "-")
            found["exactness"][name] = two_runs(
                data, runs, sizes, more, end, straight_by_launcher=not found.get("verbs")
            )
            save(found)
            if "verbs" not in found:
                found["verbs"] = verbs(runs / "straight", data, end)
                found["scalars"] = read_back(runs / "straight", sizes)
                save(found)
    wrong = [f"{name}: {result}" for name, result in found["exactness"].items() if name == "deterministic" and not
             (result.get("losses", {}).get("bit_equal") and result["weights"]["bit_equal"])]  # fmt: skip
    if wrong:
        raise RuntimeError(f"a deterministic run did not resume bit for bit: {'; '.join(wrong)}")
    return found


def train_command(data: Path, run_dir: Path, sizes: Sizes, more: tuple) -> list[Any]:
    """`scalekd train` into a folder, where it goes on from the newest checkpoint."""
    return [
        *(*SCALEKD, "train", *sizes.arguments, "--data.root", data, "--run.dir", run_dir, "--run.log_every", 1),
        *("--run.save_every", sizes.save_every, "--run.resume", "auto", "--run.progress", "plain", *more),
    ]


def two_runs(
    data: Path, runs: Path, sizes: Sizes, more: tuple, end: float, straight_by_launcher: bool
) -> dict[str, Any]:
    """Trains straight through, and killed and resumed; how far the two are apart."""
    whole, cut = runs / "straight", runs / "killed"
    launcher = ("--gpus", 1) if straight_by_launcher else ()
    result: dict[str, Any] = {
        "straight_s": commands.run([*train_command(data, whole, sizes, more), *launcher], end - time.monotonic())
    }
    half = sizes.steps // 2
    process = commands.start(train_command(data, cut, sizes, more))
    try:
        while not (saved := [p.name for p in checkpoints_of(cut) if int(p.name[4:]) >= half]):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run ended with {process.poll()} before its checkpoint of step {half}")
            time.sleep(0.05)
    finally:
        commands.kill_tree(process)
        process.wait()
    result["killed_after"] = saved[-1]
    result["resumed_s"] = commands.run(train_command(data, cut, sizes, more), end - time.monotonic())
    losses = [scalars(run)["loss/total"] for run in (whole, cut)]
    result["losses"] = difference_of_losses(*losses)
    a, b = (load_file(run / "student.safetensors") for run in (whole, cut))
    apart = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    result["weights"] = {"bit_equal": all(torch.equal(a[name], b[name]) for name in a), "max_difference": apart}
    print(json.dumps(result), flush=True)
    return result


def difference_of_losses(one: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """How far two runs' losses are apart, and from which step on.

    Raises:
        RuntimeError: They have not logged the same steps.
    """
    if one.keys() != other.keys():
        raise RuntimeError(f"{len(one)} and {len(other)} steps were logged: {sorted(one.keys() ^ other.keys())[:5]}")
    apart = {step: abs(one[step] - other[step]) for step in one}
    unequal = [step for step, value in apart.items() if value]
    return {
        "steps": len(one),
        "bit_equal": not unequal,
        "max_difference": max(apart.values()),
        "first_unequal_step": min(unequal, default=None),
        "first": one[min(one)],
        "last": one[max(one)],
    }


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: name -> step -> value, from the files of all its starts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def read_back(run_dir: Path, sizes: Sizes) -> dict[str, Any]:
    """The last value of each scalar of a run.

    Raises:
        RuntimeError: A step has no loss.
    """
    logged = scalars(run_dir)
    if sorted(logged["loss/total"]) != list(range(1, sizes.steps + 1)):
        raise RuntimeError(f"TensorBoard has the loss of {len(logged['loss/total'])} steps, not of {sizes.steps}")
    return {name: values[max(values)] for name, values in sorted(logged.items())}


def verbs(run_dir: Path, data: Path, end: float) -> dict[str, Any]:
    """Consolidates and evaluates a run.

    Raises:
        RuntimeError: The weights, or the top-1, are not those of the run.
    """
    file = run_dir.parent / "consolidated.safetensors"
    commands.run([*SCALEKD, "consolidate", run_dir, file], end - time.monotonic())
    a, b = load_file(file), load_file(run_dir / "student.safetensors")
    if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
        raise RuntimeError("consolidated weights are not those that the run has written")
    command = [*SCALEKD, "evaluate", file, "--data", data]
    done = subprocess.run(
        [*map(str, command)], cwd=harness.ROOT, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic())
    )
    print("$", *command, done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"scalekd evaluate ended with {done.returncode}")
    return {
        "evaluate": done.stdout.strip().splitlines()[-1:],
        "results": json.loads((run_dir / "results.json").read_text()),
    }
