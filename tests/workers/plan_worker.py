"""What real engines hold and send: a file holds JSON, a {zero_optimization, autocast, optimizer} for each case's name."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
from ranks import own_arguments, tell

from scalekd_ds.build import build_distiller
from scalekd_ds.config import DataConfig, OptimConfig, RunConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.engine.zero_layout import shards_of
from scalekd_ds.training.build_engine import build_engine

CLASSES, MICRO, ACCUMULATION, RANKS = 11, 2, 2, 2
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
# numbers that two ranks do not divide
CHANNELS = [16, 16, 33, 61]
OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
}
# norms and overflow flags
SCALAR = 2


def config_of(optimizer: str) -> RunConfig:
    return RunConfig(
        student="resnet18",
        student_kwargs={"layers": [1, 1, 1, 1], "channels": CHANNELS},
        teacher="swin_tiny_patch4_window7_224",
        teacher_kwargs=SWIN | {"num_classes": CLASSES},
        teacher_weights="none",
        global_batch_size=MICRO * ACCUMULATION * RANKS,
        micro_batch_size=MICRO,
        data=DataConfig(image_size=32),
        optim=OptimConfig(optimizer, lr=1e-3),
    )


def ds_json(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "torch_autocast": {"enabled": case["autocast"], "dtype": "bfloat16"},
        "zero_optimization": dict(case["zero_optimization"]),
        "steps_per_print": 10**9,
    }


def nbytes(value: Any) -> int:
    """Bytes of the storages of tensors in nested containers, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(value)
    return sum(storages.values())


def count_collectives(sent: dict[str, int]) -> None:
    """Adds up the bytes of whole tensors, as every call into DeepSpeed's backend states them."""
    backend = deepspeed.comm.comm.cdb
    for name, operation in OPERATIONS.items():
        call = getattr(backend, name)

        def counted(*args: Any, _call: Any = call, _operation: str = operation, **kwargs: Any) -> Any:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            largest = max(tensors, key=lambda t: t.numel())
            if largest.numel() >= SCALAR:
                sent[_operation] += largest.numel() * largest.element_size()
            return _call(*args, **kwargs)

        setattr(backend, name, counted)


def gradients_of(engine: Any) -> int:
    """Bytes of the gradients that are kept from one micro batch to the next."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    kept = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if stage == 2:
        kept.append(zero.all_grad_tensors)
    elif stage == 3:
        kept.append(zero.grad_partitions_flat_buffer)
    return nbytes(kept)


def case_of(case: dict[str, Any], sent: dict[str, int]) -> dict[str, Any]:
    cfg = config_of(case["optimizer"])
    distiller = build_distiller(cfg, CLASSES, verbose=False)
    engine = build_engine(distiller, cfg, ds_config.merge(ds_json(case), cfg, RANKS), 10, 100)
    if case["autocast"]:
        distiller.teacher.lower_precision(torch.bfloat16)
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    result: dict[str, Any] = {"buckets": 0, "gathered": 0}

    def during_backward(_: torch.Tensor) -> None:
        if stage:
            buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
            result["buckets"] = max(result["buckets"], nbytes(buckets))

    for step in range(2):
        sent.clear()
        for micro in range(ACCUMULATION):
            images, labels = torch.randn(MICRO, 3, 32, 32), torch.randint(CLASSES, (MICRO,))
            losses = engine(images, labels, distiller.teacher_targets(images))
            if stage == 3:
                whole = [p for p in distiller.parameters() if p.ds_status.name == "AVAILABLE"]
                result["gathered"] = sum(p.numel() * p.element_size() for p in whole)
            # the last gradients to come: the buckets are there by then
            handle = next(distiller.student.parameters()).register_hook(during_backward)
            engine.backward(losses["loss/total"])
            handle.remove()
            if step == 1 and micro == 0:
                result["gradients"] = gradients_of(engine)
            engine.step()
    parameters = [p.ds_tensor if stage == 3 else p for p in distiller.parameters()]
    inner = zero.optimizer if stage else zero
    masters = [shard.flat for shard in shards_of(engine)] if stage else []
    result |= {
        "parameters": nbytes(parameters),
        "optimizer": nbytes(masters) + nbytes([list(state.values()) for state in inner.state.values()]),
        "sent": dict(sent),
        "buffers": nbytes(list(distiller.buffers())),
        "teacher": nbytes([*distiller.teacher.parameters(), *distiller.teacher.buffers()]),
    }
    everyone = [None] * RANKS
    torch.distributed.all_gather_object(everyone, result)
    engine.destroy()
    # of numbers, those of the fullest rank
    return {key: value if key == "sent" else max(r[key] for r in everyone) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    cases = json.loads(parser.parse_args(own_arguments()).cases.read_text())
    start_processes()
    torch.set_num_threads(1)
    sent: dict[str, int] = defaultdict(int)
    count_collectives(sent)
    tell({name: case_of(case, sent) for name, case in cases.items()})


if __name__ == "__main__":
    main()
