"""Cases of LAMB's kernels against plain loops in float64, and against PyTorch's operations; run by test_fused_lamb.py."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from interpreted import print_cases

from scalekd_ds.engine.zero_layout import Segment, Shard
from scalekd_ds.kernels.lamb.blocks import BLOCK
from scalekd_ds.kernels.lamb.reference import lamb_layer, trust_ratio
from scalekd_ds.optim import fused_lamb, lamb
from scalekd_ds.optim.layers import cut_into_layers

# more than a block, more than two, odd, one element, none
SIZES = [(BLOCK + 64,), (5, 7), (2 * BLOCK + 3,), (1,), (0,), (16, 3, 3, 3), (130,)]
LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.999), 1e-6, 0.1


def relative(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    scale = theirs.double().abs().max().clamp_min(1e-30) if theirs.numel() else 1.0
    return float((ours.double() - theirs.double()).abs().max() / scale) if theirs.numel() else 0.0


def parameters_of(sizes, device, zeros=()):
    torch.manual_seed(0)
    made = [torch.zeros(size) if i in zeros else torch.randn(size) for i, size in enumerate(sizes)]
    return [torch.nn.Parameter(p.to(device)) for p in made]


def gradients_of(sizes, steps, device, silent=()):
    """Of every step, none of them near 0, where Adam's direction turns rounding into a step; zeros for layers in `silent`."""
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        made = [torch.rand(size) + 0.5 for size in sizes]
        found.append([(g * 0 if i in silent else g).to(device) for i, g in enumerate(made)])
    return found


def optimizer_of(parameters, free, **more):
    groups = [
        {
            "params": [p for i, p in enumerate(parameters) if (i in free) == without],
            "weight_decay": 0.0 if without else DECAY,
        }
        for without in (False, True)
    ]
    return lamb.Lamb([g for g in groups if g["params"]], **{"lr": LR, "betas": BETAS, "eps": EPS} | more)


def train(parameters, optimizer, gradients, late, fused):
    """Steps, each by the kernels or not as `fused` says; those in `late` have no gradient in the first one."""
    for step, grads in enumerate(gradients):
        with mock.patch.object(lamb, "runs_triton", return_value=fused[step % len(fused)]):
            for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
                parameter.grad = None if i in late and step == 0 else grad.clone()
            # as a schedule does
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 + step)
            optimizer.step()


def layers(sizes, free=(), zeros=(), silent=(), late=(), steps=2, transposed=False, fused=(True,), device="cpu"):
    """A list of layers, each in a tensor of its own, through the optimizer."""
    gradients = gradients_of(sizes, steps, device, silent)
    if transposed:
        gradients = [[g.mT.contiguous().mT if g.dim() == 2 else g for g in grads] for grads in gradients]
    results = {}
    for name in ("fused", "again", "torch"):
        parameters = parameters_of(sizes, device, zeros)
        optimizer = optimizer_of(parameters, free)
        train(parameters, optimizer, gradients, late, (False,) if name == "torch" else fused)
        moments = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        results[name] = [p.detach() for p in parameters], moments
    expected = [p.detach().double() for p in parameters_of(sizes, device, zeros)]
    for i, weight in enumerate(expected):
        first, second, counted = torch.zeros_like(weight), torch.zeros_like(weight), 0
        for step, grads in enumerate(gradients):
            if not (i in late and step == 0):
                counted += 1
                rest = (counted, LR * (1 + step), BETAS, EPS, 0.0 if i in free else DECAY)
                lamb_layer(weight, grads[i].double(), first, second, *rest)
    return summary(results, expected)


def summary(results, expected):
    (weights, moments), (weights_again, moments_again), (plain, plain_moments) = results.values()
    pairs = list(zip([*weights, *moments], [*weights_again, *moments_again], strict=True))
    return {
        "of float64": max(map(relative, weights, expected)),
        "torch of float64": max(map(relative, plain, expected)),
        "weights of torch's": max(map(relative, weights, plain)),
        "moments of torch's": max(map(relative, moments, plain_moments)),
        "deterministic": float(all(torch.equal(a, b) for a, b in pairs)),
        "finite": float(all(torch.isfinite(w).all() for w in weights)),
    }


def shards(sizes, ranks, padding=0, shift=0, free=False, zeros=(), steps=2, device="cpu"):
    """Layers one after the other in flat memory that is cut into equal shards, as ZeRO does, each with its own launches.

    The ranks' squared norms are added up as their all-reduce does. Every shard begins `shift` elements from an aligned address,
    and the padding holds NaN.
    """
    weights = [p.detach() for p in parameters_of(sizes, device, zeros)]
    gradients = gradients_of(sizes, steps, device)
    total = sum(w.numel() for w in weights)
    held = -(-(total + padding) // ranks)
    group = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0 if free else DECAY}

    def flat(tensors):
        joined = torch.cat([t.reshape(-1) for t in tensors])
        return torch.cat([joined, joined.new_full((ranks * held - total,), float("nan"))])

    def cut():
        made, segments_of, start = flat(weights), [[] for _ in range(ranks)], 0
        for layer, weight in enumerate(weights):
            for rank in range(ranks):
                begin, end = max(start, rank * held), min(start + weight.numel(), (rank + 1) * held)
                if begin < end:
                    segments_of[rank].append(Segment(layer, begin - rank * held, end - begin, begin - start))
            start += weight.numel()
        found = []
        for rank, segments in enumerate(segments_of):
            own = torch.nn.Parameter(placed(made[rank * held : (rank + 1) * held]))
            found.append((cut_into_layers([Shard(own, weights, segments)]), own))
        return found

    def placed(values):
        memory = torch.empty(len(values) + shift, device=device)[shift:]
        return memory.copy_(values)

    def run(fused):
        ours, moments = cut(), [[placed(torch.zeros(held, device=device)) for _ in range(2)] for _ in range(ranks)]
        tables = [fused_lamb.tables_of(c) for c, _ in ours] if fused else []
        # the same step as in `Lamb.step`, in one process
        for step, grads in enumerate(gradients, start=1):
            joined = flat(grads)
            squares = torch.zeros(ranks, 2, len(sizes), dtype=torch.float64, device=device)
            work = []
            for rank, (c, own) in enumerate(ours):
                own.grad = placed(joined[rank * held : (rank + 1) * held])
                if fused:
                    work.append(fused_lamb.begin(tables[rank], [[m] for m in moments[rank]], step, group))
                    if not free:
                        fused_lamb.add_squared_norms(squares[rank], 0, work[-1])
                else:
                    optimizer = lamb.Lamb([own], **group)
                    optimizer.state[own] |= dict(zip(("exp_avg", "exp_avg_sq"), moments[rank], strict=True))
                    work.append(optimizer._adam_direction([own], step, group))
                    if not free:
                        lamb.add_squared_norms(squares[rank], c, work[-1])
            ratios = trust_ratio(*squares.sum(0).sqrt())
            for rank, (c, _) in enumerate(ours):
                if not fused:
                    lamb._apply(work[rank], c, ratios, group)
                elif not free:
                    fused_lamb.apply(work[rank], ratios, 0)
        whole = torch.cat([own.detach() for _, own in ours])
        parts = [list(torch.cat(m)[:total].split([w.numel() for w in weights])) for m in zip(*moments, strict=True)]
        changed = float(not whole[total:].isnan().all())
        return list(whole[:total].split([w.numel() for w in weights])), parts[0] + parts[1], changed

    with torch.no_grad():
        found = {name: run(name != "torch") for name in ("fused", "again", "torch")}
    expected = [w.double().reshape(-1) for w in weights]
    for i, weight in enumerate(expected):
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for step, grads in enumerate(gradients, start=1):
            rest = (step, LR, BETAS, EPS, group["weight_decay"])
            lamb_layer(weight, grads[i].double().reshape(-1), first, second, *rest)
    answer = summary({name: values[:2] for name, values in found.items()}, expected)
    return answer | {"padding changed": found["fused"][2]}


def no_eps(device="cpu"):
    """Without an eps, what lies beyond a layer's end is 0 / 0."""
    sizes = [(5,), (7,)]
    parameters = parameters_of(sizes, device)
    optimizer = optimizer_of(parameters, (), eps=0.0)
    train(parameters, optimizer, gradients_of(sizes, 1, device), (), (True,))
    return {"finite": float(all(p.isfinite().all() for p in parameters))}


CASES = {
    "layers": {"call": "layers", "sizes": SIZES},
    "layers, some free of decay": {"call": "layers", "sizes": SIZES, "free": (1, 3, 5)},
    "layers, all free of decay": {"call": "layers", "sizes": SIZES[1:2], "free": (0,)},
    "layers of zeros": {"call": "layers", "sizes": SIZES[1:4], "zeros": (0, 2), "free": (2,)},
    "layers with gradients of zeros": {"call": "layers", "sizes": SIZES[1:4], "zeros": (0,), "silent": (0, 2)},
    "layers whose steps differ": {"call": "layers", "sizes": SIZES, "late": (0, 1), "free": (1, 6)},
    "layers by either way in turn": {"call": "layers", "sizes": SIZES[1:4], "steps": 4, "fused": (True, False)},
    "one layer": {"call": "layers", "sizes": [(33, 5)]},
    "an empty layer alone": {"call": "layers", "sizes": [(0,)]},
    "gradients in another layout": {"call": "layers", "sizes": [(33, 5), (8, 8)], "transposed": True},
    "a shard": {"call": "shards", "sizes": SIZES, "ranks": 1},
    "three shards with padding": {"call": "shards", "sizes": SIZES, "ranks": 3, "padding": 19},
    "shards without decay": {"call": "shards", "sizes": SIZES, "ranks": 2, "padding": 3, "free": True},
    "shards at an odd address": {"call": "shards", "sizes": SIZES, "ranks": 2, "shift": 1},
    "a shard of padding alone": {"call": "shards", "sizes": [(3,), (2,)], "ranks": 3, "padding": 10},
    "shards with a layer of zeros": {"call": "shards", "sizes": SIZES[:3], "ranks": 2, "zeros": (1,)},
    "without an eps": {"call": "no_eps"},
}


def run(call, **case):
    return {"layers": layers, "shards": shards, "no_eps": no_eps}[call](**case)


if __name__ == "__main__":
    print_cases(CASES, run)
