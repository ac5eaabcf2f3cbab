"""Files of master weights and optimizer states that any number of ranks reads at any ZeRO stage.

shards_rank0.safetensors ...    a float32 tensor `OFFSET/KEY/NAME` for each part of a layer that the rank updates;
                                OFFSET is its first element in the flattened layer, NAME the layer, and KEY `weight` or
                                one of the optimizer's states (`exp_avg`, `momentum_buffer`, ...)
engine.json                     counters, the schedule, and the optimizer's scalars, which are the same on every rank

DeepSpeed's own files are pickles, and only the same number of ranks can read them. These hold nothing but tensors and
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.engine.zero_layout import Segment, Shard, shards_of
from scalekd_ds.errors import UserError
from scalekd_ds.names import utf8_path

ENGINE = "engine.json"
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def shard_file(folder: Path, rank: int) -> Path:
    """The path of the file in which a rank writes its shards."""
    return folder / f"shards_rank{rank}.safetensors"


def _parameter_names(engine: Any) -> dict[int, str]:
    """id -> name of every parameter."""
    return {id(p): name for name, p in engine.module.named_parameters()}


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer, which ZeRO wraps in its own."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _check_in_memory(shard: Shard) -> None:
    """Raises UserError where the master weights are on NVMe, and the tensor that should hold them is empty."""
    last = max((s.start + s.count for s in shard.segments), default=0)
    if shard.flat.numel() < last:
        raise UserError(
            "the DeepSpeed config keeps the weights on NVMe, from where checkpoints cannot be written: set "
            "zero_optimization.offload_optimizer.device to cpu or none."
        )


@torch.no_grad()
def snapshot(engine: Any, copies: HostCopies) -> dict[str, torch.Tensor]:
    """Copies this rank's shards to the CPU, so that training can go on while they are written.

    Args:
        engine: The engine.
        copies: Host memory for the copies.

    Returns:
        The tensors of the rank's file by their keys.

    Raises:
        UserError: The weights are on NVMe.
    """
    names, state, found = _parameter_names(engine), _base_optimizer(engine).state, {}
    for shard in shards_of(engine):
        _check_in_memory(shard)
        states = {"weight": shard.flat} | {
            key: value
            for key, value in state.get(shard.flat, {}).items()
            if torch.is_tensor(value) and value.numel() == shard.flat.numel() and value.dim() > 0
        }
        for key, flat in states.items():
            flat = flat.detach().reshape(-1)
            for part in shard.segments:
                name = f"{part.offset}/{key}/{names[id(shard.parameters[part.layer])]}"
                found[name] = copies(name, flat.narrow(0, part.start, part.count))
    return found


def engine_state(engine: Any) -> dict[str, Any]:
    """What the engine needs to resume besides the shards, as values that JSON can hold."""
    scalars: dict[str, float] = {}
    for values in _base_optimizer(engine).state.values():
        for key, value in values.items():
            if not torch.is_tensor(value) or value.dim() == 0:
                scalars[key] = float(value)
        # the scalars, such as the number of steps, are the same for every layer
        if scalars:
            break
    scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else {}
    # the functions of the step come from the run's configuration
    scheduler = {k: v for k, v in scheduler.items() if k != "lr_lambdas"}
    return {
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "scheduler": scheduler,
        "scalars": scalars,
        "loss_scale": float(getattr(engine.optimizer, "cur_scale", 1.0)),
    }


@dataclass(frozen=True)
class _SavedPiece:
    """One tensor in a file of shards: `count` elements of a layer from `offset` on."""

    offset: int
    count: int
    file: Any
    key: str


class _SavedShards:
    """The pieces in the files of all ranks, by (key, layer)."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._pieces: dict[tuple[str, str], list[_SavedPiece]] = {}
        for rank in range(world_size):
            path = shard_file(folder, rank)
            with utf8_path(path) as alias:
                file = safe_open(alias, "pt")
            for entry in file.keys():  # noqa: SIM118
                offset, key, name = entry.split("/", 2)
                count = file.get_slice(entry).get_shape()[0]
                self._pieces.setdefault((key, name), []).append(_SavedPiece(int(offset), count, file, entry))

    def keys(self) -> set[str]:
        """`weight`, and the optimizer's states."""
        return {key for key, _ in self._pieces}

    def layers(self, key: str, prefix: str) -> dict[str, int]:
        """Name -> number of elements of each layer whose name starts with `prefix`."""
        return {
            name: max(piece.offset + piece.count for piece in pieces)
            for (found, name), pieces in self._pieces.items()
            if found == key and name.startswith(prefix)
        }

    def read(self, key: str, name: str, part: Segment) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (first element within `part`, values) for every piece that overlaps `part` of a layer.

        Raises:
            UserError: The pieces do not cover the part.
        """
        end, seen = part.offset + part.count, 0
        for piece in self._pieces.get((key, name), []):
            first, last = max(piece.offset, part.offset), min(piece.offset + piece.count, end)
            if first < last:
                seen += last - first
                yield first - part.offset, piece.file.get_slice(piece.key)[first - piece.offset : last - piece.offset]
        if seen != part.count:
            raise UserError(
                f"the checkpoint has {seen} of {part.count} values of {key} of {name}: it is of another model or "
                "optimizer; resume the run with the settings that it was started with."
            )


def saved_weights(folder: Path, world_size: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Reads trained layers of a verified checkpoint without an engine.

    Args:
        folder: Folder of the checkpoint.
        world_size: Number of ranks that wrote it.
        prefix: Beginning of the names of the layers to read.

    Returns:
        Name -> whole layer, flattened, float32.

    Raises:
        UserError: Values of a layer are missing.
    """
    saved_shards = _SavedShards(folder, world_size)
    found = {}
    for name, numel in saved_shards.layers("weight", prefix).items():
        flat = torch.empty(numel)
        for place, values in saved_shards.read("weight", name, Segment(0, 0, numel, 0)):
            flat.narrow(0, place, len(values)).copy_(values)
        found[name] = flat
    return found


@torch.no_grad()
def restore(engine: Any, folder: Path, world_size: int) -> None:
    """Loads what `snapshot` and `engine_state` saved into the engine; collective.

    Args:
        engine: The engine, with any number of ranks and any ZeRO stage.
        folder: Folder of the checkpoint.
        world_size: Number of ranks that wrote it.

    Raises:
        UserError: The checkpoint is that of another model or optimizer, or the weights are on NVMe.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
    saved_shards, names = _SavedShards(folder, world_size), _parameter_names(engine)
    _check_layers(engine, saved_shards.layers("weight", ""), folder)
    saved = json.loads((folder / ENGINE).read_text())
    optimizer = _base_optimizer(engine)
    state = optimizer.state
    for shard in shards_of(engine):
        _check_in_memory(shard)
        parts = shard.segments
        if stage == 0:
            # without ZeRO every rank updates the whole layer
            parts = [Segment(0, 0, shard.flat.numel(), 0)]
        for key in sorted(saved_shards.keys()):
            if key == "weight":
                target = shard.flat.detach()
            else:
                target = state[shard.flat].setdefault(key, torch.zeros_like(shard.flat))
            flat = target.view(-1)
            for part in parts:
                name = names[id(shard.parameters[part.layer])]
                for place, values in saved_shards.read(key, name, part):
                    flat.narrow(0, part.start + place, len(values)).copy_(values)
        for key, value in saved["scalars"].items():
            state[shard.flat][key] = scalar_state(value, optimizer, shard.flat)
    _update_model_weights(engine)
    for name, value in saved["counters"].items():
        setattr(engine, name, value)
    # a step begins here. DeepSpeed finds its end by the number of micro batches so far, of which there were others to a step
    # at another micro batch or number of ranks
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None:
        _restore_schedule(engine.lr_scheduler, _base_optimizer(engine).param_groups, saved["scheduler"])
    if hasattr(zero, "loss_scaler") and hasattr(zero.loss_scaler, "cur_scale"):
        zero.loss_scaler.cur_scale = saved["loss_scale"]


def scalar_state(value: float, optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> torch.Tensor:
    """A scalar of an optimizer's state, such as the number of steps, where the optimizer keeps that of `tensor`.

    Fused optimizers read it in their kernels, on the tensor's device; others on the host, which then waits for nothing.
    """
    return torch.tensor(value, device=tensor.device if optimizer.defaults.get("fused") else "cpu")


def _restore_schedule(scheduler: Any, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Takes the step of a saved schedule; the rates are those of the run's configuration, which may have changed."""
    own = {"lr_lambdas": [None] * len(groups), "base_lrs": scheduler.base_lrs}
    scheduler.load_state_dict(saved | own)
    rates = [
        base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, lr in zip(groups, rates, strict=True):
        group["lr"] = lr


def _check_layers(engine: Any, saved: dict[str, int], folder: Path) -> None:
    """Raises UserError unless the checkpoint has exactly the layers that are trained, of the same sizes.

    A part of a larger layer would else pass for a smaller one.
    """
    own = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters() if p.requires_grad}
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            has, trains = (f"{numel:,} values" if numel else "nothing" for numel in (saved.get(name), own.get(name)))
            raise UserError(
                f"{folder} has {has} of {name}, where this run trains {trains}: it is of another model; resume the run with "
                "the settings that it was started with."
            )


def _update_model_weights(engine: Any) -> None:
    """Copies the master weights to the weights that the model computes with."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for group, (half, master) in enumerate(
            zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        ):
            if half is not None and master.numel():
                half.copy_(master)
            zero._unflatten_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
