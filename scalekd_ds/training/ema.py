"""The moving average of the student's weights, sharded as ZeRO shards its master weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors import safe_open
from torch import nn

from scalekd_ds.checkpoint.layout import WEIGHTS
from scalekd_ds.engine.gather import average_over_ranks, gather_all
from scalekd_ds.engine.zero_layout import shards_of
from scalekd_ds.errors import UserError
from scalekd_ds.names import utf8_path


def start_ema(engine: Any, decay: float, checkpoint: Path | None) -> StudentEma | None:
    """Makes the moving average of `engine.module.student`, or returns None where `decay` is 0.

    Args:
        engine: The engine, with its checkpoint loaded if there is one.
        decay: `ema.decay`.
        checkpoint: That checkpoint, whose average is loaded, or None.

    Raises:
        UserError: The checkpoint has an average and the run keeps none, or the other way round.
    """
    saved = checkpoint / WEIGHTS["ema"] if checkpoint else None
    if decay == 0.0:
        if saved and saved.is_file():
            raise UserError(
                f"{checkpoint} holds an average of the student, which ema.decay 0 would lose: give the --ema.decay "
                "that the run was started with."
            )
        return None
    ema = StudentEma(engine, engine.module.student, decay)
    if saved:
        ema.load(saved)
    return ema


def slow_average_notice(decay: float, steps: int) -> str | None:
    """One line where the average of a run of `steps` still holds a visible part of the first step's weights at its end.

    Returns None where that part, decay^steps, is at most 5%.
    """
    left = decay ** (steps - 1)
    # a single step's average is its weights
    if decay == 0.0 or steps == 1 or left <= 0.05:
        return None
    # the average then spans the last tenth of the run; one of a few steps follows the weights more closely still
    faster = min(max(0.5, 1.0 - 10.0 / steps), 0.05 ** (1.0 / (steps - 1)))
    # rounded down, so that a run with it has nothing to say
    faster = math.floor(faster * 1e6) / 1e6
    reach = "spans the last tenth of such a run" if steps > 20 else "leaves them behind"
    return (
        f"ema.decay is {decay:g} and the run has {steps} steps: {left:.0%} of the average will still be the first step's "
        f"weights. --ema.decay {faster:g} {reach}."
    )


class StudentEma:
    """average <- decay * average + (1 - decay) * weights, after each optimizer step.

    The first step copies the weights, and the decay is constant from then on. This is the published setting (mmengine's
    `ExponentialMovingAverage`), and also that of torch's `AveragedModel`. BatchNorm's statistics are averaged like the
    weights, as in timm's `ModelEmaV3`, because the current ones belong to the weights of the last ten steps or so and
    not to the averaged weights. (The published files copy them, but no published run with an average has a student with
    BatchNorm.) Integer buffers are copied.

    Each rank averages the float32 master weights that it updates, so an update communicates nothing, and all ranks
    together hold one copy of the student. Projectors are not averaged.

    Args:
        engine: The engine, with its checkpoint loaded if there is one.
        student: The student in the engine's module.
        decay: Share of the old average in the new one.

    Raises:
        UserError: The master weights are on NVMe.
        RuntimeError: The installed DeepSpeed keeps its shards in other fields than the versions known here.
    """

    def __init__(self, engine: Any, student: nn.Module, decay: float) -> None:
        self.engine, self.student, self.decay = engine, student, decay
        self.started = False
        self._locate_student()
        self._averages = [source.clone() for source in self._live_values()]

    def _locate_student(self) -> None:
        """Finds the student's segments in this rank's shards, and its floating-point buffers."""
        state = self.student.state_dict(keep_vars=True)
        names: dict[int, str] = {}
        for name, tensor in state.items():
            # tied weights have one average, which is saved under each of their names
            names.setdefault(id(tensor), name)
        self._pieces, self._averaged = [], set()
        for shard in shards_of(self.engine):
            self._averaged |= {id(p) for p in shard.parameters if id(p) in names}
            for segment in shard.segments:
                name = names.get(id(shard.parameters[segment.layer]), "")
                if not name:
                    continue
                if shard.flat.numel() < segment.start + segment.count:
                    raise UserError(
                        f"ema.decay is {self.decay}, but the DeepSpeed config keeps the weights on NVMe, where no "
                        "average can be taken: offload to the CPU, or set --ema.decay 0."
                    )
                self._pieces.append((name, shard.flat, segment))
        self._buffers = {
            name: tensor
            for name, tensor in state.items()
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        }

    def _live_values(self) -> list[torch.Tensor]:
        """The tensors to average, float32: views of the master weights, then the floating-point buffers."""
        # the views are made at each call, because DeepSpeed may move a shard to other memory
        flats = [flat.detach().reshape(-1).narrow(0, part.start, part.count) for _, flat, part in self._pieces]
        return [source.float() for source in (*flats, *self._buffers.values())]

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average; call it after each optimizer step. A skipped step changes nothing."""
        # a rank may hold no segment of a small student
        if not self._averages or not self.engine.was_step_applied():
            return
        if self.started:
            torch._foreach_lerp_(self._averages, self._live_values(), 1.0 - self.decay)
        else:
            torch._foreach_copy_(self._averages, self._live_values())
            self.started = True

    @torch.no_grad()
    def state(self, is_kept: bool = True) -> dict[str, torch.Tensor]:
        """The averaged student's whole state dict on the CPU, with timm's names; collective.

        The averaged statistics of BatchNorm are set to their mean over the ranks.

        Args:
            is_kept: Whether this rank gets the state; without it, it only takes part, and gets an empty dict.
        """
        pieces, buffers = self._averages_by_name()
        average_over_ranks(list(buffers.values()))
        state: dict[str, torch.Tensor] = {}
        wholes: dict[int, torch.Tensor] = {}
        for name, tensor in self.student.state_dict(keep_vars=True).items():
            if id(tensor) not in self._averaged:
                state |= gather_all({name: buffers.get(name, tensor)}, is_kept=is_kept)
                continue
            if id(tensor) not in wholes:
                whole = self._gather_average(tensor, pieces.get(name, []))
                # where it is not kept, an entry alone, which says that its turn has been
                wholes[id(tensor)] = whole.cpu() if is_kept else whole.new_empty(0)
            if is_kept:
                state[name] = wholes[id(tensor)].clone()
        return state

    def _averages_by_name(self) -> tuple[dict[str, list], dict[str, torch.Tensor]]:
        """Name -> (offset in the flattened layer, average) of each segment, and name -> average of each buffer."""
        count = len(self._pieces)
        pieces: dict[str, list] = {}
        for (name, _, segment), average in zip(self._pieces, self._averages, strict=False):
            pieces.setdefault(name, []).append((segment.offset, average))
        return pieces, dict(zip(self._buffers, self._averages[count:], strict=True))

    def _gather_average(self, parameter: nn.Parameter, pieces: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """The whole average of one parameter, from the pieces of all ranks; collective."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        # one rank has each element and the others have 0; a sum of the bits as integers is exact, even for -0.0
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.engine.device)
        for offset, average in pieces:
            bits[offset : offset + average.numel()] = average.view(torch.int32).to(bits.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape)

    @torch.no_grad()
    def load(self, weights: Path) -> None:
        """Loads this rank's part of a saved average, which any number of ranks wrote at any ZeRO stage.

        Args:
            weights: The file of the average in a checkpoint.

        Raises:
            UserError: There is no such file.
        """
        if not weights.is_file():
            raise UserError(
                f"{weights.parent} holds no average of the student, and ema.decay is {self.decay}: go on with "
                "--ema.decay 0, or start a new run from its student.safetensors with --student_weights."
            )
        self._locate_student()
        pieces, buffers = self._averages_by_name()
        with utf8_path(weights) as path, safe_open(path, "pt") as file:
            for name, parts in pieces.items():
                saved = file.get_tensor(name).view(-1)
                for offset, average in parts:
                    average.copy_(saved[offset : offset + average.numel()])
            for name, average in buffers.items():
                average.copy_(file.get_tensor(name))
        self.started = True
