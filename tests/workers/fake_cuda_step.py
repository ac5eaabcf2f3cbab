"""One step of the trainer on fake CUDA tensors, for each case that is named: prints what it asked of the GPU, as JSON.

A process of `fake_cuda.environment`. The models, the losses, the optimizer, the average and the step are the trainer's own;
DeepSpeed's engine, which would want a real device, is left out: this is what surrounds it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import fake_cuda
import timm
import torch
from cuda_cases import CASES, Case
from fake_cuda.engine import Engine, make_state

from scalekd_ds import losses
from scalekd_ds.build import build_distiller
from scalekd_ds.config import DataConfig
from scalekd_ds.data.mix import Mixer
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.evaluation.accuracy import evaluate, evaluate_module
from scalekd_ds.kernels.cross_attention import ops as attention
from scalekd_ds.kernels.cross_attention import table
from scalekd_ds.kernels.cross_attention import triton_kernels as attention_kernels
from scalekd_ds.kernels.dual_view import launch
from scalekd_ds.kernels.dual_view import ops as dual_view
from scalekd_ds.kernels.dual_view import triton_kernels as dual_view_kernels
from scalekd_ds.optim.optimizers import build_optimizer
from scalekd_ds.training.ema import start_ema
from scalekd_ds.training.nonfinite import NonfiniteGuard, skip_nonfinite
from scalekd_ds.training.step import train_step
from scalekd_ds.watching.agreement import logit_agreement

BATCH, CLASSES = 8, 1000


def build(case: Case) -> ScaleKD:
    """The distiller of a case as the trainer builds it, without memory."""
    with torch.device("meta"):
        distiller = build_distiller(case.cfg, CLASSES, verbose=False)
        if case.dtype is not None and distiller.teacher is not None:
            distiller.teacher.lower_precision(getattr(torch, case.dtype))
        return distiller


def build_there(case: Case, device: torch.device) -> ScaleKD:
    """The distiller of models that are on the GPU already, as an own loop may build it."""
    cfg = case.cfg
    student = timm.create_model(cfg.student, num_classes=CLASSES, **cfg.student_kwargs)
    teacher = timm.create_model(cfg.teacher, num_classes=CLASSES, **cfg.teacher_kwargs)
    return ScaleKD(student.to(device), teacher.to(device), verbose=False)


def run_case(case: Case) -> dict[str, Any]:
    """Counts a step, and an evaluation where the case has one."""
    device = torch.device("cuda", case.device)
    # tensors of the case before must not be met again
    losses._dct_basis.cache_clear()
    losses.dct_matrix.cache_clear()
    launch._filter_cache.clear()
    table.measured = lambda: _Everything(case.attention)
    distiller = None if case.moved_first else build(case)
    with fake_cuda.tensors():
        return count_step(case, distiller, device)


def count_step(case: Case, distiller: ScaleKD | None, device: torch.device) -> dict[str, Any]:
    """As `run_case`, with models on the meta device, or None where they are on the GPU before."""
    with fake_cuda.Watch():
        if distiller is None:
            distiller = build_there(case, device)
        else:
            fake_cuda.materialise(device, *filter(None, (distiller, distiller.teacher)))
        distiller.train()
        optimizer = build_optimizer(distiller, case.cfg.optim)
        engine = Engine(distiller, optimizer, case.dtype and getattr(torch, case.dtype), case.accumulation)
        skip_nonfinite(engine)
        images = [torch.empty(BATCH, 3, *distiller.image_size, device=device) for _ in range(case.accumulation)]
        labels = torch.empty(BATCH, dtype=torch.int64, device=device)
        run = SimpleNamespace(
            cache=None,
            cfg=case.cfg,
            distiller=distiller,
            engine=engine,
            teacher=distiller.teacher,
            mixer=Mixer(DataConfig(mixup=0.8, cutmix=1.0), CLASSES, BATCH, 0, 0) if case.mixes else None,
            ema=start_ema(engine, 0.99, None),
            saver=SimpleNamespace(wait_copied=lambda: None),
            nonfinite=NonfiniteGuard(distiller, Path("unused"), 3),
            step=0,
            grad_norm=None,
        )
        if case.has_state:
            make_state(distiller, optimizer, run.ema)
    answers: dict[str, torch.Tensor] = {}
    for _ in range(case.steps):
        watch = fake_cuda.Watch()
        fake_cuda.run_own_operators(watch, dual_view, dual_view_kernels, "scalekd_ds::dual_view")
        fake_cuda.run_own_operators(watch, attention, attention_kernels, "scalekd_ds::cap_attention")
        distiller.time_part = watch.part
        distiller.on_logits = lambda student, teacher: answers.update(student=student, teacher=teacher)
        with watch:
            found = train_step(run, iter([(i, None if case.unlabelled else labels) for i in images]))
        run.step += 1
    with fake_cuda.Watch() as evaluation:
        batches = [(images[0], labels)] * (2 if case.evaluates else 0)
        if batches:
            evaluate_module(distiller.student, batches, device)
        if batches and distiller.teacher is not None and distiller.teacher.num_classes:
            evaluate(lambda batch: distiller.teacher_targets(batch).logits, batches, device)
    with fake_cuda.Watch() as watched:
        if answers:
            logit_agreement(**{f"{who}_logits": logits for who, logits in answers.items()})
    trained = [p for p in distiller.parameters() if p.requires_grad]
    return {
        "launches": watch.launches,
        "operations": watch.operations,
        "syncs": watch.syncs,
        "copies": watch.copies,
        "attention": [[*key, count] for key, count in watch.attention.items()],
        "losses": {name: [str(loss.dtype), str(loss.device)] for name, loss in found.items()},
        "devices": sorted({str(p.device) for p in trained}),
        "evaluation": {"syncs": evaluation.syncs, "copies": evaluation.copies},
        "watching": {"syncs": watched.syncs, "copies": watched.copies},
    }


class _Everything(dict):
    """A table of attention kernels in which every shape was measured."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, key: Any, default: Any = None) -> str:
        return self.name


def main() -> None:
    start_processes()
    fake_cuda.pretend()
    for name in sys.argv[1:]:
        try:
            found = run_case(CASES[name])
        except Exception as error:
            place = traceback.format_exc(limit=-6)
            found = {"error": f"{type(error).__name__}: {error}", "traceback": place}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main()
