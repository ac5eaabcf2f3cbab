"""Two steps with each of several DeepSpeed JSONs, in the same ranks: a file holds JSON, {case: content of the JSON}.

Rank 0 prints as JSON what came of each case: the losses, a sum over the weights, whether it could be saved and restored;
or the error, after which it goes on with the next case, as all ranks fail alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime import torch_autocast
from plan_worker import CLASSES, MICRO, SWIN
from ranks import common_folder, own_arguments, tell
from safetensors.torch import save_file

from scalekd_ds.build import build_distiller
from scalekd_ds.checkpoint.shard_files import ENGINE, engine_state, restore, shard_file, snapshot
from scalekd_ds.config import DataConfig, OptimConfig, RunConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.gather import student_state
from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.training.build_engine import build_engine
from scalekd_ds.training.nonfinite import skip_nonfinite

ACCUMULATION, STEPS = 2, 2
# ZeRO-3 replaces it for the whole process, with memory_efficient_linear
LINEAR = torch.nn.functional.linear


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    torch.set_num_threads(1)
    start_processes()
    folder, found = common_folder(), {}
    for name, case in json.loads(parser.parse_args(own_arguments()).cases.read_text()).items():
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                found[name] = run_case(case, folder)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        found[name]["said"] = said.getvalue()
        gc.collect()
    tell(found)


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    cfg = RunConfig(
        student="resnet18",
        student_kwargs={"layers": [1, 1, 1, 1], "channels": [16, 16, 33, 61]},
        teacher="swin_tiny_patch4_window7_224",
        teacher_kwargs=SWIN | {"num_classes": CLASSES},
        teacher_weights="none",
        global_batch_size=MICRO * ACCUMULATION * dist.get_world_size(),
        micro_batch_size=MICRO,
        data=DataConfig(image_size=32),
        optim=OptimConfig(case.get("optimizer", "sgd"), lr=0.05, clip=1.0),
    )
    file = folder / f"ds_rank{dist.get_rank()}.json"
    file.write_text(json.dumps(case["json"]))
    merged = ds_config.merge(ds_config.read(str(file)), cfg, dist.get_world_size())
    # of the process, and a run has one of its own
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch.nn.functional.linear = LINEAR
    torch.manual_seed(0)
    distiller = build_distiller(cfg, CLASSES, verbose=False)
    dtype = ds_config.autocast_dtype(merged)
    if dtype is not None:
        distiller.teacher.lower_precision(dtype)
    engine = build_engine(distiller, cfg, merged, 10, 100)
    skip_nonfinite(engine)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step(scale: float = 1.0) -> float:
        for _ in range(ACCUMULATION):
            images = torch.randn(MICRO, 3, 32, 32, generator=generator) * scale
            labels = torch.randint(CLASSES, (MICRO,), generator=generator)
            parts = engine(images, labels, distiller.teacher_targets(images))
            engine.backward(parts["loss/total"])
            engine.step()
        return parts["loss/total"].item()

    losses = [step() for _ in range(STEPS)]
    norm = engine.get_global_grad_norm()
    before, skipped = checksum(distiller), engine.skipped_steps
    buffers = {name: buffer.clone() for name, buffer in distiller.named_buffers()}

    def reset_buffers() -> None:
        for name, buffer in distiller.named_buffers():
            buffer.copy_(buffers[name])

    # on one rank, and all skip it
    step(float("nan") if dist.get_rank() == 1 else 1.0)
    poisoned = checksum(distiller)
    reset_buffers()
    rank, batches = dist.get_rank(), generator.get_state()
    save_file(snapshot(engine, HostCopies()), shard_file(folder, rank))
    if rank == 0:
        (folder / ENGINE).write_text(json.dumps(engine_state(engine)))
    dist.barrier()
    step()
    changed = checksum(distiller)
    restore(engine, folder, dist.get_world_size())
    restored = checksum(distiller)
    reset_buffers()
    generator.set_state(batches)
    step()
    again = checksum(distiller)
    engine.destroy()
    return {
        "losses": losses,
        "norm": None if norm is None else float(norm),
        "weights": before,
        "poisoned": poisoned,
        "changed": changed,
        "restored": restored,
        "again": again,
        "skipped": [skipped, engine.skipped_steps - skipped],
    }


def checksum(distiller: Any) -> float:
    trained = dict(distiller.student.named_parameters())
    return sum(v.double().abs().sum().item() for name, v in student_state(distiller).items() if name in trained)


if __name__ == "__main__":
    main()
