"""LAMB whose layer-wise norms are those of whole layers under ZeRO too.

ZeRO gives an optimizer flat shards that cut through layers, so an ordinary LAMB takes the norms of parts of several
layers (its weights are 18 to 33% off after three steps). Here each rank sums the squares of its segment of every layer,
and one all-reduce in each call adds them up: the update equals the unsharded one at any stage and on any number of
ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from scalekd_ds.engine.zero_layout import Segment, Shard, shards_of


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020) as in timm, except that gradients are clipped by DeepSpeed.

    The trust ratio |w| / |update| applies only to groups with weight decay (timm's `always_adapt=False`). Call `attach`
    once the engine exists.

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

    def _shard(self, parameter: torch.Tensor) -> Shard:
        """The layout of one of the tensors that the optimizer updates."""
        if self._engine is None or self._engine.zero_optimization_stage() == 0:
            return Shard(parameter, [parameter], [Segment(0, 0, parameter.numel(), 0)])
        if id(parameter) not in self._shards:
            # loading a checkpoint may have replaced the tensors
            self._shards = {id(shard.flat): shard for shard in shards_of(self._engine)}
        if id(parameter) not in self._shards:
            import deepspeed

            raise RuntimeError(
                f"LAMB got a shard that is not among the engine's in DeepSpeed {deepspeed.__version__}: use a version "
                "that the tests cover."
            )
        return self._shards[id(parameter)]

    def _adam_direction(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Adam's update with weight decay, before the trust ratio; it advances the moments."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2), grad = state["step"].item(), group["betas"], parameter.grad
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = state["exp_avg_sq"].sqrt().div_((1.0 - beta2**step) ** 0.5).add_(group["eps"])
        update = (state["exp_avg"] / (1.0 - beta1**step)).div_(root)
        return update.add_(parameter, alpha=group["weight_decay"]) if group["weight_decay"] else update

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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    work.append((group, parameter, self._adam_direction(parameter, group), self._shard(parameter)))
        if not work:
            return loss
        ratios = self._trust_ratios(work)
        first = 0
        for group, parameter, update, shard in work:
            flat, step = parameter.view(-1), update.view(-1)
            for segment in shard.segments:
                ratio = ratios[first + segment.layer] if group["weight_decay"] else 1.0
                part = slice(segment.start, segment.start + segment.count)
                flat[part].sub_(step[part] * (group["lr"] * ratio))
            first += len(shard.parameters)
        return loss

    def _is_divided(self) -> bool:
        """Whether other ranks hold parts of this rank's layers."""
        if self._engine is None or self._engine.zero_optimization_stage() == 0:
            return False
        from deepspeed import comm as dist

        return dist.get_world_size() > 1

    def _trust_ratios(self, work: list) -> torch.Tensor:
        """|w| / |update| of every layer in `work`, 1 where either is 0; on the device, without a host sync."""
        layers = sum(len(shard.parameters) for *_, shard in work)
        squares = torch.zeros(2, layers, dtype=torch.float64, device=work[0][1].device)
        first = 0
        for _, parameter, update, shard in work:
            flat, step = parameter.view(-1), update.view(-1)
            for segment in shard.segments:
                part = slice(segment.start, segment.start + segment.count)
                # norm() is one kernel; the sums over segments and ranks are in float64
                squares[0, first + segment.layer] += flat[part].norm().double().square()
                squares[1, first + segment.layer] += step[part].norm().double().square()
            first += len(shard.parameters)
        if self._is_divided():
            # here, so that an optimizer without an engine needs no DeepSpeed
            from deepspeed import comm as dist

            # NCCL sends nothing from host memory, where the shards are with offload_optimizer
            sent = squares.to(self._engine.device)
            dist.all_reduce(sent)
            squares = sent.to(squares.device)
        weight, update = squares.sqrt()
        return torch.where((weight > 0) & (update > 0), weight / update, torch.ones_like(weight)).float()


def attach(optimizer: Lamb, engine: Any) -> None:
    """Gives LAMB the layout of its parameters in DeepSpeed's shards; call it after `deepspeed.initialize`.

    Raises:
        RuntimeError: The installed DeepSpeed keeps its shards in other fields than the versions known here.
    """
    optimizer._engine = engine
    if engine.zero_optimization_stage() > 0:
        optimizer._shards = {id(shard.flat): shard for shard in shards_of(engine)}
