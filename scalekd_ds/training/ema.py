"""Moving average of the student, sharded as ZeRO shards its master weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors import safe_open
from torch import nn

from scalekd_ds.checkpoint.layout import WEIGHTS
from scalekd_ds.engine.gather import average_over_ranks, gathered
from scalekd_ds.engine.zero_layout import shards_of
from scalekd_ds.errors import UserError


def start_ema(engine: Any, decay: float, checkpoint: Path | None) -> StudentEma | None:
    """The average of `engine.module.student`, from the checkpoint that the engine has loaded if there is one; None for 0.

    Raises:
        UserError: The checkpoint has an average and the run keeps none, or the other way round.
    """
    saved = checkpoint / WEIGHTS["ema"] if checkpoint else None
    if decay == 0.0:
        if saved and saved.is_file():
            raise UserError(
                f"{checkpoint} holds an average of the student, which ema.decay 0 would lose: give the --ema.decay that the "
                "run was started with."
            )
        return None
    ema = StudentEma(engine, engine.module.student, decay)
    if saved:
        ema.load(saved)
    return ema


class StudentEma:
    """average <- decay * average + (1 - decay) * weights, once an optimizer step.

    The first step copies the weights, and the decay is the same from then on: the published setting (mmengine's
    `ExponentialMovingAverage`), which is also torch's `AveragedModel`. BatchNorm's statistics are averaged like the
    weights, as timm's `ModelEmaV3` does: the live ones are those of the last ten steps' weights, which are not the
    averaged ones. (The published files copy them, but none that averages has a student with BatchNorm.) Integer buffers
    are the live ones.

    Each rank averages the fp32 master weights that it updates, so an update communicates nothing, and all ranks together
    hold one copy of the student. Projectors are left out.

    Args:
        engine: The engine, with its checkpoint loaded if there is one.
        student: The bare student inside it.
        decay: Share of the old average that stays.

    Raises:
        UserError: The master weights are on NVMe.
        RuntimeError: This DeepSpeed keeps its shards in other fields than the ones known here.
    """

    def __init__(self, engine: Any, student: nn.Module, decay: float) -> None:
        self.engine, self.student, self.decay = engine, student, decay
        self.started = False
        self._bind()
        self._averages = [source.clone() for source in self._sources()]

    def _bind(self) -> None:
        """Finds the student's part of this rank's shards, and its buffers."""
        state = self.student.state_dict(keep_vars=True)
        names: dict[int, str] = {}
        for name, tensor in state.items():
            # tied weights have one average, and every name gets it
            names.setdefault(id(tensor), name)
        self._pieces, self._averaged = [], set()
        for shard in shards_of(self.engine):
            self._averaged |= {id(p) for p in shard.parameters if id(p) in names}
            for segment in shard.segments:
                name = names.get(id(shard.parameters[segment.layer]))
                if name is None:
                    continue
                if shard.flat.numel() < segment.start + segment.count:
                    raise UserError(
                        f"ema.decay is {self.decay}, but the DeepSpeed config keeps the weights on NVMe, where no average "
                        "can be taken: offload to the CPU, or set --ema.decay 0."
                    )
                self._pieces.append((name, shard.flat, segment))
        self._buffers = {
            name: tensor
            for name, tensor in state.items()
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        }

    def _sources(self) -> list[torch.Tensor]:
        """What is averaged, float32: views of the master weights, then the floating-point buffers."""
        # views are made anew each time: DeepSpeed may give a shard other memory
        flats = [flat.detach().reshape(-1).narrow(0, part.start, part.count) for _, flat, part in self._pieces]
        return [source.float() for source in (*flats, *self._buffers.values())]

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step; nothing where the engine skipped it."""
        # a rank may hold no part of a small student
        if not self._averages or not self.engine.was_step_applied():
            return
        if self.started:
            torch._foreach_lerp_(self._averages, self._sources(), 1.0 - self.decay)
        else:
            torch._foreach_copy_(self._averages, self._sources())
            self.started = True

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """The averaged student's whole state-dict on the CPU, timm's names; collective.

        BatchNorm's averaged statistics become their mean over ranks.
        """
        pieces, buffers = self._split()
        average_over_ranks(list(buffers.values()))
        state, wholes = {}, {}
        for name, tensor in self.student.state_dict(keep_vars=True).items():
            if id(tensor) not in self._averaged:
                source = buffers.get(name, tensor)
                state[name] = gathered(source)
                continue
            if id(tensor) not in wholes:
                wholes[id(tensor)] = self._whole(tensor, pieces.get(name, []))
            state[name] = wholes[id(tensor)].clone()
        return state

    def _split(self) -> tuple[dict[str, list], dict[str, torch.Tensor]]:
        """The averages by name: (offset, elements) of parameters, and buffers."""
        count, pieces = len(self._pieces), {}
        for (name, _, segment), average in zip(self._pieces, self._averages, strict=False):
            pieces.setdefault(name, []).append((segment.offset, average))
        return pieces, dict(zip(self._buffers, self._averages[count:], strict=True))

    def _whole(self, parameter: nn.Parameter, pieces: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        # summed as integers, every element by one rank alone: the very bits, -0.0 included
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.engine.device)
        for offset, average in pieces:
            bits[offset : offset + average.numel()] = average.view(torch.int32).to(bits.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape).cpu()

    @torch.no_grad()
    def load(self, weights: Path) -> None:
        """Takes the average of a checkpoint's file, from any number of ranks and any ZeRO stage; each rank its own part.

        Raises:
            UserError: There is no such file.
        """
        if not weights.is_file():
            raise UserError(
                f"{weights.parent} holds no average of the student, and ema.decay is {self.decay}: go on with --ema.decay 0, "
                "or start a new run from its student.safetensors with --student_weights."
            )
        self._bind()
        pieces, buffers = self._split()
        with safe_open(weights, "pt") as file:
            for name, parts in pieces.items():
                saved = file.get_tensor(name).view(-1)
                for offset, average in parts:
                    average.copy_(saved[offset : offset + average.numel()])
            for name, average in buffers.items():
                average.copy_(file.get_tensor(name))
        self.started = True
