"""Two ranks: every ZeRO stage x optimizer against the unsharded one. Prints one JSON line of largest relative errors."""

from __future__ import annotations

import argparse

import deepspeed
import timm.optim
import torch
from ranks import backward, begin, common_folder, engine_of, loss_of, tell
from torch import nn

from scalekd_ds.config import OptimConfig
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer, param_groups
from scalekd_ds.training.nonfinite import unsharded_grad_norm

STEPS = 4
CASES = {f"zero{stage}": {"stage": stage} for stage in range(3)} | {
    "zero1 round robin": {"stage": 1, "round_robin_gradients": True},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3 persistent": {"stage": 3, "stage3_param_persistence_threshold": 100_000},
}


class Net(nn.Module):
    """Odd sizes, so that shards cut through layers; a norm, biases and an embedding for the groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.fc2 = nn.Linear(13, 37), nn.LayerNorm(37), nn.Linear(37, 11)
        self.pos_embed = nn.Parameter(torch.randn(1, 37) * 0.02)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x)) + self.pos_embed))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 13, generator=generator), torch.randn(8, 11, generator=generator)) for _ in range(8)]


def reference(cfg: OptimConfig, clip: float) -> list[torch.Tensor]:
    """The same steps in plain PyTorch on the whole batch, with timm's Lamb."""
    net = Net()
    groups = param_groups(net, cfg)
    if cfg.name == "lamb":
        optimizer = timm.optim.Lamb(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, max_grad_norm=None)
    else:
        optimizer = build_optimizer(net, cfg)
    for x, y in batches()[:STEPS]:
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def global_norm() -> float:
    """Of the first step's gradients over the whole batch, in float64."""
    net = Net().double()
    x, y = batches()[0]
    loss_of(net(x.double()), y.double()).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()


def start(cfg: OptimConfig, zero: dict, clip: float):
    net = Net()
    optimizer = build_optimizer(net, cfg)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": clip}
    engine = engine_of(net, optimizer, zero, config)
    if cfg.name == "lamb":
        lamb.attach(optimizer, engine)
    return engine


def train(engine, data) -> float:
    """Returns the last step's gradient norm, as the trainer logs it."""
    for x, y in data:
        backward(engine, x, y)
        norm = unsharded_grad_norm(engine)
        engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def weights(engine) -> list[torch.Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [p.detach().clone() for p in parameters]


def error(ours, theirs, start_from) -> float:
    """Largest difference relative to how far the reference moved: a wrong update cannot hide behind large weights."""
    return max(
        ((a - b).abs().max() / (b - s).abs().max().clamp_min(1e-12)).item()
        for a, b, s in zip(ours, theirs, start_from, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    arguments = begin(parser)
    initial = [p.detach().clone() for p in Net().parameters()]
    errors = {}
    for name, lr in (("sgd", 0.05), ("adamw", 0.01), ("lamb", 0.02)):
        cfg = OptimConfig(name, lr=lr, weight_decay=0.1, eps=1e-6)
        for clip in (0.0, 0.05):
            expected = reference(cfg, clip)
            for stage, zero in ((name, CASES[name]) for name in arguments.cases):
                engine = start(cfg, zero, clip)
                norm = train(engine, batches()[:1])
                errors[f"{name} norm clip {clip:g} {stage}"] = abs(norm / global_norm() - 1.0)
                train(engine, batches()[1:STEPS])
                errors[f"{name} clip {clip:g} {stage}"] = error(weights(engine), expected, initial)
                engine.destroy()
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        errors[f"lamb checkpoint {stage}"] = round_trip(CASES[stage])
    tell(errors)


def round_trip(zero: dict) -> float:
    """LAMB over 6 steps in one go against 3, save, load in a fresh engine, 3."""
    cfg = OptimConfig("lamb", lr=0.02, weight_decay=0.1, eps=1e-6)
    whole = start(cfg, zero, 0.0)
    train(whole, batches()[:6])
    folder = str(common_folder())
    first = start(cfg, zero, 0.0)
    train(first, batches()[:3])
    first.save_checkpoint(folder, tag="t")
    second = start(cfg, zero, 0.0)
    second.load_checkpoint(folder, tag="t")
    train(second, batches()[3:6])
    return max((a - b).abs().max().item() for a, b in zip(weights(second), weights(whole), strict=True))


if __name__ == "__main__":
    main()
