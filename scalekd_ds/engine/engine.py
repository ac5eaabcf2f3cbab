"""DeepSpeed: processes, devices, and the one engine that holds student and projectors."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import deepspeed
import numpy as np
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from scalekd_ds.cluster.hosts import read_hosts
from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.ds_config import stage_of
from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.engine.host_memory import keep_freed_memory
from scalekd_ds.errors import UserError
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer, build_schedule

# how the launcher is called, as a command, a script or a module
_LAUNCHERS = ("deepspeed", "ds", "runner.py", "deepspeed.launcher.runner")


def check_hostfile() -> None:
    """Refuses a hosts file that does not exist, or that says more than DeepSpeed reads in it.

    Without the file DeepSpeed's launcher only warns and then trains on this node alone, so a typing error turns a 32-GPU
    job into an 8-GPU one. The launcher's command line is the only place where the name can still be read.
    """
    for process in psutil.Process().parents():
        try:
            command, folder = process.cmdline(), process.cwd()
        except psutil.Error:
            continue
        if not any(os.path.basename(part) in _LAUNCHERS for part in command[:3]):
            continue
        for position, part in enumerate(command):
            flag, _, value = part.partition("=")
            if flag in ("--hostfile", "-H"):
                value = value or (command[position + 1] if position + 1 < len(command) else "")
                path = os.path.join(folder, value)
                if not os.path.isfile(path):
                    raise UserError(
                        f"hosts file {value!r} does not exist: DeepSpeed would train on this node alone. Give the right "
                        "path to --hostfile, or leave it out for one machine."
                    )
                read_hosts(path)
            # what follows the script's name belongs to the script
            if part.endswith(".py") and os.path.basename(part) != "runner.py":
                break


def start_processes() -> torch.device:
    """Joins the job's process group, alone where no launcher started it, and returns this rank's device."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update({k: v for k, v in alone.items() if k not in os.environ})
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    deepspeed.init_distributed(verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        _unlink_shared_buffers()
        keep_freed_memory()
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(), local_rank)


def _unlink_shared_buffers() -> None:
    """Takes away the names of the shared memory in which DeepSpeed's all-reduce on CPUs meets; what is mapped stays mapped.

    It never does so itself: each run would leave 66 MB a rank in memory until the machine is started again, and the next
    run on the same port could meet the last one's state.
    """
    # by then every rank has mapped all of them
    dist.barrier()
    job = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    with suppress(OSError):
        os.unlink(f"/dev/shm/deepspeed_allreduce_buffer_{job}")


def job_store() -> Any:
    """torch's key-value store of the job, which rank 0 serves; None on one rank."""
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def seed_everything(seed: int) -> None:
    """Seeds every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_engine(
    distiller: ScaleKD, cfg: RunConfig, ds_config: dict[str, Any], steps_per_epoch: float, total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """One engine for student and projectors, with the recipe's optimizer and schedule.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    lr = cfg.learning_rate
    optimizer = build_optimizer(distiller, dataclasses.replace(cfg.optim, lr=lr))
    if stage_of(ds_config) == 3:
        # taps call forward_intermediates(), not forward(), so what the root module owns itself (position embeddings,
        # class token) has to be fetched with the distiller's forward
        for parameter in distiller.student.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(distiller, parameter)
        # a pair reads its views' parameters itself, so that both run in one pass
        for pair in distiller.projectors.values():
            for parameter in pair.parameters():
                deepspeed.zero.register_external_parameter(pair, parameter)
    try:
        engine, *_ = deepspeed.initialize(
            model=distiller,
            optimizer=optimizer,
            lr_scheduler=lambda opt: build_schedule(opt, cfg.schedule, steps_per_epoch, total_steps, lr),
            config=ds_config,
        )
    except deepspeed.runtime.config.DeepSpeedConfigError as error:
        raise UserError(f"DeepSpeed refuses {cfg.run.ds_config}: {error}") from None
    if stage_of(ds_config) == 3:
        # While DeepSpeed records its first pass it gives up even what it is to keep whole, and fetches it again rounded to
        # autocast's 16 bits: the first step of a resumed run would differ from the same step of the whole one.
        for parameter in engine.optimizer.persistent_parameters:
            parameter.is_external_param = True
    if isinstance(optimizer, lamb.Lamb):
        lamb.attach(optimizer, engine)
    return engine


@torch.no_grad()
def synchronise_buffers(module: nn.Module) -> None:
    """Makes BatchNorm's statistics the mean over ranks.

    ZeRO never communicates buffers: each rank's drift apart, and checkpoints keep rank 0's.
    """
    average_over_ranks([b for b in module.buffers() if b.is_floating_point() and b.numel()])


@torch.no_grad()
def average_over_ranks(buffers: list[torch.Tensor]) -> None:
    """Makes floating-point tensors their mean over ranks, in place, with one all-reduce."""
    if dist.get_world_size() == 1 or not buffers:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def student_state(distiller: ScaleKD, copies: HostCopies | None = None) -> dict[str, torch.Tensor]:
    """The student's whole state-dict on the CPU, from any ZeRO stage. Collective: every rank calls it.

    Buffers are this rank's: call `synchronise_buffers` first.

    Args:
        distiller: Of the engine.
        copies: The memory to copy into; fresh memory without it.
    """
    copies = copies or HostCopies()
    return {
        name: gathered(tensor, copies, name) for name, tensor in distiller.student.state_dict(keep_vars=True).items()
    }


@contextmanager
def _whole(tensor: torch.Tensor, **options: Any) -> Iterator[None]:
    """A parameter is whole in the block, and afterwards where it was before.

    The small parameters that ZeRO-3 keeps whole between steps are exact, and DeepSpeed's own context would leave them
    sharded: autocast's forward pass then fetches them rounded to 16 bits. A step after a save would differ from the same
    step after a resume.
    """
    if not hasattr(tensor, "ds_id"):
        yield
        return
    was_whole = tensor.ds_status is ZeroParamStatus.AVAILABLE
    with deepspeed.zero.GatheredParameters([tensor], **options):
        yield
    if was_whole and tensor.ds_status is not ZeroParamStatus.AVAILABLE:
        tensor.all_gather()


@torch.no_grad()
def gathered(tensor: torch.Tensor, copies: HostCopies | None = None, key: str = "") -> torch.Tensor:
    """A copy of a whole parameter or buffer on the CPU; collective where ZeRO-3 shards it."""
    with _whole(tensor):
        return (copies or HostCopies())(key, tensor)


@torch.no_grad()
def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Undoes `gathered`; collective where ZeRO-3 shards the parameter."""
    with _whole(tensor, modifier_rank=0):
        if not hasattr(tensor, "ds_id") or dist.get_rank() == 0:
            tensor.copy_(values)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank where it is True on one."""
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
