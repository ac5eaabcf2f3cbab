"""LAMB whose layer-wise norms are those of whole layers under ZeRO too.

ZeRO gives an optimizer flat shards that cut through layers, so an ordinary LAMB takes the norms of parts of several
layers (its weights are 18 to 33% off after three steps). Here each rank sums the squares of its segment of every layer,
and one all-reduce in each call adds them up: the update equals the unsharded one at any stage and on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from scalekd_ds.engine.zero_layout import Segment, Shard, shards_of
from scalekd_ds.kernels.lamb import runs_triton
from scalekd_ds.optim import fused_lamb
from scalekd_ds.optim.fused_lamb import FusedUpdate, Tables
from scalekd_ds.optim.layers import Cut, add_squared_norms, cut_into_layers, scale_layers

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Adam's updates one after the other, or what Triton's kernels make them of
Update = torch.Tensor | FusedUpdate


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020) as in timm, except that gradients are clipped by DeepSpeed.

    The trust ratio |w| / |update| applies only to groups with weight decay (timm's `always_adapt=False`). Call `attach`
    once the engine exists.

    A step works on all layers of a group together: the moments of a group lie in one piece of memory, of which the state has
    views, and so do the numbers of steps. On a GPU it launches some thirty kernels, and for each list of a layer's tensors that
    is read or written one more in 30 to 110 layers; nothing of it waits for the GPU. Beside the state it takes the memory of
    one update, and 256 MiB at most for the factors of the layers. Where Triton's kernels were measured to be faster, three of
    them do all of it in two passes over the memory, and hold nothing beside the state.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Term added to the root of the second moment.
        weight_decay: Factor of the decay term weight_decay * w in the update.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._engine: Any = None
        self._shards: dict[int, Shard] = {}
        # by the id of the first tensor: where the layers lie in it and in those that are updated with it
        self._cuts: dict[int, Cut] = {}
        # by the id of the first tensor and the name: a moment or the numbers of steps in one piece, and the state's views of it
        self._flat: dict[tuple[int, str], tuple[torch.Tensor, list[torch.Tensor]]] = {}
        # by the id of the first tensor: what Triton's kernels find its layers by
        self._tables: dict[int, Tables] = {}

    def _is_sharded(self) -> bool:
        return self._engine is not None and self._engine.zero_optimization_stage() > 0

    def _is_divided(self) -> bool:
        """Whether other ranks hold parts of this rank's layers."""
        if not self._is_sharded():
            return False
        from deepspeed import comm as dist

        return dist.get_world_size() > 1

    def _shard(self, parameter: torch.Tensor) -> Shard:
        """The layout of one of the tensors that the optimizer updates."""
        if not self._is_sharded():
            return Shard(parameter, [parameter], [Segment(0, 0, parameter.numel(), 0)])
        if id(parameter) not in self._shards:
            # loading a checkpoint may have replaced the tensors
            self._shards = {id(shard.flat): shard for shard in shards_of(self._engine)}
            self._cuts, self._tables = {}, {}
        if id(parameter) not in self._shards:
            import deepspeed

            raise RuntimeError(
                f"LAMB got a shard that is not among the engine's in DeepSpeed {deepspeed.__version__}: use a version "
                "that the tests cover."
            )
        return self._shards[id(parameter)]

    def _cut(self, parameters: list[torch.Tensor]) -> Cut:
        """Where layers lie in the flattened `parameters`, found once for the same tensors."""
        held = self._cuts.get(id(parameters[0]))
        if held is None or not _are_same(held.tensors, parameters):
            held = self._cuts[id(parameters[0])] = cut_into_layers([self._shard(p) for p in parameters])
        return held

    def _advance(self, group: dict[str, Any]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Counts a step of each tensor of a group that has a gradient, and yields them by their number of steps."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros(())
                for name in _MOMENTS:
                    self.state[parameter][name] = torch.zeros_like(parameter)
        # on the CPU, so that reading them waits for nothing
        counters = self._joined(parameters, "step").add_(1).tolist()
        alike: dict[Any, list[torch.Tensor]] = {}
        for parameter, counter in zip(parameters, counters, strict=True):
            alike.setdefault((int(counter), parameter.device, parameter.dtype), []).append(parameter)
        for (step, *_), tensors in alike.items():
            yield step, tensors

    def _joined(self, parameters: list[torch.Tensor], name: str) -> torch.Tensor:
        """The moment `name` of `parameters`, or their numbers of steps, in one piece that their state has views of."""
        if len(parameters) == 1:
            return self.state[parameters[0]][name].view(-1)
        flat, views = self._flat.get((id(parameters[0]), name), (None, []))
        own = [self.state[p][name] for p in parameters]
        # loading a checkpoint may have replaced the state, and another layer may have its first gradient
        if flat is None or not _are_same(views, own):
            flat = torch.cat([value.reshape(-1) for value in own])
            views = [part.view_as(value) for part, value in zip(_parts(flat, own), own, strict=True)]
            for parameter, view in zip(parameters, views, strict=True):
                self.state[parameter][name] = view
            self._flat[id(parameters[0]), name] = flat, views
        return flat

    def _adam_direction(self, parameters: list[torch.Tensor], step: int, group: dict[str, Any]) -> torch.Tensor:
        """Adam's updates with weight decay, before the trust ratio, one after the other; it advances the moments."""
        beta1, beta2 = group["betas"]
        first, second = (self._joined(parameters, name) for name in _MOMENTS)
        # `_advance` yields those that have one
        grads = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        # where the gradients were copied together, their copy is the memory of the update
        update = torch.sqrt(second, out=grad) if len(grads) > 1 else second.sqrt()
        # first / (1 - beta1^step) over the corrected root plus eps, with the corrections in two numbers
        correction = 1.0 - beta1**step
        update.mul_(correction / (1.0 - beta2**step) ** 0.5).add_(correction * group["eps"])
        torch.div(first, update, out=update)
        if group["weight_decay"] and len(parameters) == 1:
            update.add_(parameters[0].view(-1), alpha=group["weight_decay"])
        elif group["weight_decay"]:
            weights = [p.view(-1) for p in parameters]
            torch._foreach_add_(_parts(update, parameters), weights, alpha=group["weight_decay"])
        return update

    def _begin(self, parameters: list[torch.Tensor], cut: Cut, step: int, group: dict[str, Any]) -> Update:
        """Advances the moments of `parameters`, and makes their updates before the trust ratio."""
        if not runs_triton(parameters):
            return self._adam_direction(parameters, step, group)
        tables = self._tables.get(id(parameters[0]))
        if tables is None or tables.cut is not cut:
            tables = self._tables[id(parameters[0])] = fused_lamb.tables_of(cut)
        moments = [[self.state[p][name] for p in parameters] for name in _MOMENTS]
        return fused_lamb.begin(tables, moments, step, group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step over all shards that have gradients; collective under ZeRO, which calls it once for each sub-group.

        Args:
            closure: Function that computes the loss again, or None.

        Returns:
            The loss of `closure`, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            for step, parameters in self._advance(group):
                cut = self._cut(parameters)
                work.append((group, cut, self._begin(parameters, cut, step, group)))
        if not work:
            return loss
        first, ratios = 0, self._trust_ratios(work)
        for group, cut, update in work:
            if isinstance(update, FusedUpdate):
                if group["weight_decay"]:
                    fused_lamb.apply(update, ratios, first)
            else:
                _apply(update, cut, ratios[first : first + cut.count], group)
            first += cut.count
        return loss

    def _trust_ratios(self, work: list[tuple[dict[str, Any], Cut, Update]]) -> torch.Tensor:
        """|w| / |update| of every layer in `work`, 1 where either is 0; on the device, without a host sync."""
        squares = torch.zeros(
            2, sum(cut.count for _, cut, _ in work), dtype=torch.float64, device=work[0][1].tensors[0].device
        )
        first = 0
        for group, cut, update in work:
            if group["weight_decay"]:
                # float32 within segments, or blocks of them; the sums over these and over ranks are in float64
                if isinstance(update, FusedUpdate):
                    fused_lamb.add_squared_norms(squares, first, update)
                else:
                    add_squared_norms(squares.narrow(1, first, cut.count), cut, update)
            first += cut.count
        if self._is_divided():
            from deepspeed import comm as dist

            # NCCL sends nothing from host memory, where the shards are with offload_optimizer
            sent = squares.to(self._engine.device)
            dist.all_reduce(sent)
            squares = sent.to(squares.device)
        weight, update = squares.sqrt_()
        return (weight / update).masked_fill_(weight * update == 0.0, 1.0)


def _apply(update: torch.Tensor, cut: Cut, ratios: torch.Tensor, group: dict[str, Any]) -> None:
    """Moves the tensors of a cut against their updates, with the trust ratios (layers,) where there are such."""
    if group["weight_decay"]:
        scale_layers(update, cut, ratios.to(update.dtype).mul_(group["lr"]))
    else:
        update.mul_(group["lr"])
    flats = [tensor.view(-1) for tensor in cut.tensors]
    if len(flats) == 1:
        flats[0].sub_(update)
    else:
        torch._foreach_sub_(flats, _parts(update, flats))


def _are_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether two lists hold the very same tensors."""
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def _parts(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of flat memory, one for each of `tensors`, which lie in it one after the other."""
    return list(flat.split([t.numel() for t in tensors]))


def attach(optimizer: Lamb, engine: Any) -> None:
    """Gives LAMB the layout of its parameters in DeepSpeed's shards; call it after `deepspeed.initialize`.

    Raises:
        RuntimeError: The installed DeepSpeed keeps its shards in other fields than the versions known here.
    """
    optimizer._engine = engine
    if engine.zero_optimization_stage() > 0:
        optimizer._shards = {id(shard.flat): shard for shard in shards_of(engine)}
