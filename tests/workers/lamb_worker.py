"""LAMB over a ResNet-50's layers at each ZeRO stage: launches of a step, and the error against plain loops. Prints JSON."""

from __future__ import annotations

from contextlib import contextmanager

import deepspeed
import timm
import torch
from ranks import begin, engine_of, share_of, tell
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalekd_ds.config import OptimConfig
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer, param_groups

CASES = {f"zero{stage}": {"stage": stage} for stage in range(4)}
CASES["zero1 offload"] = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
STEPS = 3
# of the tensors of a list that one kernel takes: 30 to 110 on a GPU, by how many lists there are
TENSORS_IN_A_LAUNCH = 30
# operators that make or name memory, and start no kernel
NO_LAUNCH = {"detach", "empty", "empty_like", "alias", "new_empty", "lift_fresh"}


class Layers(nn.Module):
    """As many layers of as many dimensions as ResNet-50 has, with few elements; the loss gives each its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device("meta"):
            shapes = [p.shape for p in timm.create_model("resnet50").parameters()]
        for number, shape in enumerate(shapes):
            small = [min(size, 3 + number % 3) for size in shape]
            # one layer of zeros, whose trust ratio is 1
            value = torch.zeros(small) if number == 7 else torch.randn(small)
            self.register_parameter(f"layer{number}", nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # no gradient is near 0, where Adam's direction turns rounding into a step
        terms = [torch.exp(0.1 * (n % 5 + 1) * p.flatten() + x.mean()).sum() for n, p in enumerate(self.parameters())]
        return torch.stack(terms).sum()


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # the numbers of steps, which are on the CPU on every device
        counts_steps = all(t.dim() == 0 for t in tensors)
        if not (is_view or counts_steps or name in NO_LAUNCH):
            is_list = name.startswith("_foreach") and isinstance(args[0], list)
            self.count += -(-len(args[0]) // TENSORS_IN_A_LAUNCH) if is_list else 1
        return out


@contextmanager
def counted(optimizer, counts: list[int]):
    """LAMB's own part of a step, over all of the calls that ZeRO makes of it."""
    own = type(optimizer).step

    def step(self, *args, **kwargs):
        with Launches() as launches:
            result = own(self, *args, **kwargs)
        counts.append(launches.count)
        return result

    type(optimizer).step = step
    try:
        yield
    finally:
        type(optimizer).step = own


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 1, generator=generator) for _ in range(2 * STEPS)]


def reference(cfg: OptimConfig, steps: int) -> list[torch.Tensor]:
    """LAMB as it is written down: one layer after the other, in float64, on the mean gradient of all ranks."""
    net = Layers().double()
    groups = param_groups(net, cfg)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in net.parameters()}
    (beta1, beta2), ranks = cfg.betas, torch.distributed.get_world_size()
    for step, x in enumerate(batches()[:steps], start=1):
        net.zero_grad()
        for share in x.double().chunk(ranks):
            (net(share) / ranks).backward()
        with torch.no_grad():
            for group in groups:
                for p in group["params"]:
                    first, second = moments[p]
                    first += (1 - beta1) * (p.grad - first)
                    second += (1 - beta2) * (p.grad**2 - second)
                    update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + cfg.eps)
                    ratio = 1.0
                    if group["weight_decay"]:
                        update = update + group["weight_decay"] * p
                        ratio = p.norm() / update.norm() if p.norm() > 0 and update.norm() > 0 else 1.0
                    p -= cfg.lr * ratio * update
    return [p.detach() for p in net.parameters()]


def start(cfg: OptimConfig, zero: dict):
    net = Layers()
    optimizer = build_optimizer(net, cfg)
    offload = {"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in zero else {}
    # DeepSpeed clips at 1.0 where nothing is said
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0} | offload
    engine = engine_of(net, optimizer, zero, config)
    lamb.attach(optimizer, engine)
    return engine, optimizer


def train(engine, data: list[torch.Tensor]) -> None:
    for x in data:
        engine.backward(engine(share_of(x)))
        engine.step()


def error(engine, expected: list[torch.Tensor]) -> float:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return max((a.double() - b).abs().max().item() for a, b in zip(parameters, expected, strict=True))


def replaced_state(optimizer: torch.optim.Optimizer) -> None:
    """Tensors of the same values in other memory, as loading a checkpoint leaves them."""
    for state in optimizer.state.values():
        state |= {key: value.clone() for key, value in state.items()}


def main() -> None:
    begin()
    results = {}
    for no_decay in ("none", "1d"):
        cfg = OptimConfig("lamb", lr=0.01, weight_decay=0.1, eps=1e-6, no_decay=no_decay)
        expected, later = reference(cfg, STEPS), reference(cfg, 2 * STEPS)
        for name, zero in CASES.items():
            engine, optimizer = start(cfg, zero)
            train(engine, batches()[: STEPS - 1])
            counts: list[int] = []
            with counted(optimizer, counts):
                train(engine, batches()[STEPS - 1 : STEPS])
            case = {"launches": counts, "error": error(engine, expected)}
            replaced_state(optimizer)
            train(engine, batches()[STEPS:])
            results[f"{name} no_decay {no_decay}"] = case | {"error after a load": error(engine, later)}
            engine.destroy()
    tell(results)


if __name__ == "__main__":
    main()
