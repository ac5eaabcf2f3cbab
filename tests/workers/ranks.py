"""What the scripts share that the launcher starts on every rank: beginning, training on a share of each batch, telling."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist


def own_arguments() -> list[str]:
    """This script's arguments without the launcher's."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def begin(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Reads the command line, keeps to one thread and meets the other ranks."""
    arguments = (parser or argparse.ArgumentParser()).parse_args(own_arguments())
    torch.set_num_threads(1)
    # as a run has it: DeepSpeed would compile its all-reduce through shared memory for a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return arguments


def common_folder() -> Path:
    """A new folder, the same one on every rank."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    return Path(folder[0])


def tell(results: Any) -> None:
    """Rank 0 prints one line of JSON, which `launching.result_of` reads."""
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.barrier()


def engine_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer, zero: dict, config: dict, **more: Any):
    """DeepSpeed's engine; `zero` is copied, since DeepSpeed writes into it."""
    config = config | {
        "zero_optimization": dict(zero),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, **more)[0]


def share_of(batch: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a batch of all ranks."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def backward(engine: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """The backward pass of this rank's share of a batch."""
    engine.backward(loss_of(engine(share_of(x)), share_of(y)))
