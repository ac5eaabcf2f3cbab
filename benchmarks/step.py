#!/usr/bin/env python3
"""The whole distillation step, ours against the published structure: `python benchmarks/step.py --pair swin_small-resnet50`.

Variants run in turn in one process, on the same weights, images and optimizer: `ours-fp32`, `published-fp32` (as the
published scripts run), and both under the same autocast, `ours-bf16` and `published-bf16`. Precision, memory formats and the
host's allocator are set by the library's own calls, as its trainer makes them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import harness
import pairs
import parts
import published
import torch
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.build import build_distiller
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.cpu_precision import cpu_computes_in
from scalekd_ds.engine.host_memory import keep_freed_memory
from scalekd_ds.optim.optimizers import build_optimizer

# ImageNet-1K's, and what timm builds by default
CLASSES = 1000

# written before anything was measured, and printed beside it
PREDICTIONS = {
    ("swin_large-resnet50", "cuda"): {
        "ours-bf16/published-bf16": 2.0,
        "mfu": 0.45,
        "peak memory, ours/published": 0.7,
        "source": "what the model asks for on an H100 at batch 128; not measured",
    },
    ("swin_small-resnet50", "cpu"): {
        "ours-bf16/published-fp32": 1.8,
        "ours-bf16/published-bf16": 1.1,
        "source": "what a restructured step should reach on two cores with bf16 dot products",
    },
}


def forward_of(
    distiller: ScaleKD, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Callable[[], dict[str, torch.Tensor]]:
    """The library's losses, as its trainer asks for them."""
    images, labels = batch

    def forward() -> dict[str, torch.Tensor]:
        # outside of autocast, as in the trainer: the teacher has its own
        targets = distiller.teacher_targets(images)
        with _autocast(images.device, dtype):
            return distiller(images, labels, targets)

    return forward


def published_forward_of(
    distiller: ScaleKD, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Callable[[], dict[str, torch.Tensor]]:
    """The losses in the published structure; `distiller` is of `published_distiller`."""
    images, labels = batch

    def forward() -> dict[str, torch.Tensor]:
        with _autocast(images.device, dtype):
            return published.losses(distiller, images, labels)

    return forward


def step_of(forward: Callable[[], dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Forward, backward, optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        forward()["loss/total"].backward()
        optimizer.step()

    return step


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass
class Variant:
    """One way to make the step; `distiller` has its own teacher, and the same trainable weights as the others'."""

    distiller: ScaleKD
    forward: Callable[[], dict[str, torch.Tensor]]
    step: Callable[[], None]


def build_variants(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Variant], torch.optim.Optimizer]:
    """The variants by name, and the optimizer of all."""
    cfg = pairs.config_of(args.pair, args.recipe)
    distiller = build_distiller(cfg, CLASSES, verbose=True).to(device).train()
    optimizer = build_optimizer(distiller, cfg.optim)
    images = torch.randn(args.batch, 3, *distiller.image_size, device=device)
    batch = images, torch.randint(CLASSES, (args.batch,), device=device)
    variants = {}
    for name in args.variants:
        whose, _, precision = name.partition("-")
        dtype = harness.DTYPES[precision]
        if whose == "published":
            used = published.published_distiller(distiller)
            forward = published_forward_of(used, batch, dtype)
        else:
            used = distiller
            if dtype != torch.float32:
                used = published.with_teacher(distiller, copy.deepcopy(distiller.teacher).lower_precision(dtype))
            forward = forward_of(used, batch, dtype)
        variants[name] = Variant(used, forward, step_of(forward, optimizer))
    return variants, optimizer


@torch.no_grad()
def losses_of(variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Every variant's losses on the same weights."""
    return {name: {k: v.item() for k, v in variant.forward().items()} for name, variant in variants.items()}


def largest_difference(losses: dict[str, dict[str, float]]) -> float:
    """Of any term between any two variants, relative to the term."""
    terms = [list(values) for values in zip(*(found.values() for found in losses.values()), strict=True)]
    return max((max(values) - min(values)) / max(map(abs, values)) for values in terms)


def memory_of(variants: dict[str, Variant], device: torch.device) -> dict[str, int | None]:
    """Peak memory of each variant's step, without the teachers that only other variants use."""
    teachers = {name: {id(p): p.nbytes for p in v.distiller.teacher.parameters()} for name, v in variants.items()}
    total = sum({k: n for held in teachers.values() for k, n in held.items()}.values())
    peaks = {}
    for name, variant in variants.items():
        peak = harness.peak_memory(variant.step, device)
        peaks[name] = None if peak is None else peak - (total - sum(teachers[name].values()))
    return peaks


def flop_of(step: Callable[[], Any]) -> int:
    """FLOP of one step: products, convolutions and PyTorch's attention, forward and backward.

    Attention in the library's own kernels is not seen; it is less than a hundredth of a step.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one run, ready for JSON."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    if device.type == "cpu" and args.keep_freed_memory:
        keep_freed_memory()
    variants, optimizer = build_variants(args, device)
    ours = f"ours-{args.dtype}" if f"ours-{args.dtype}" in args.variants else "ours-fp32"
    result: dict[str, Any] = {
        "benchmark": "step",
        "machine": harness.machine(device),
        "pair": args.pair or args.recipe,
        "batch": args.batch,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "variants")},
    }
    precisions = dict.fromkeys(name.partition("-")[2] for name in args.variants)
    before = harness.ceilings(device, args.ceiling_repeats, precisions)
    result["losses"] = losses_of(variants)
    result["losses_differ_by"] = largest_difference(result["losses"])
    steps = {name: variant.step for name, variant in variants.items()}
    seconds = harness.alternate(steps, device, args.repeats, args.warmup)
    result["ceilings"] = harness.higher(before, harness.ceilings(device, args.ceiling_repeats, precisions))
    flop = flop_of(steps[ours]) if ours in steps else None
    memory = memory_of(variants, device)
    result["flop_per_image"] = flop and flop / args.batch
    result["variants"] = {}
    for name, times in seconds.items():
        spread = harness.summary(times)
        ceiling = result["ceilings"].get(f"matmul_flop_per_s/{name.partition('-')[2]}")
        result["variants"][name] = {
            **spread,
            "images_per_s": 1e3 * args.batch / spread["median"],
            "mfu": flop and ceiling and flop / (spread["median"] / 1e3) / ceiling,
            "floor_ms": flop and ceiling and 1e3 * flop / ceiling,
            "peak_memory_bytes": memory[name],
            "parts": parts.profile(
                name, steps[name], variants[name].distiller, optimizer, device, args.profile_repeats
            ),
        }
    result["ratios"] = {
        f"{ours}/{other}": harness.speedup(seconds[other], seconds[ours])
        for other in seconds
        if ours in seconds and other != ours
    }
    if ours != "ours-fp32" and {"ours-fp32", "published-fp32"} <= seconds.keys():
        result["ratios"]["ours-fp32/published-fp32"] = harness.speedup(seconds["published-fp32"], seconds["ours-fp32"])
    result["predictions"] = PREDICTIONS.get((args.pair, device.type))
    return result


def report(result: dict[str, Any]) -> None:
    """The tables of one run."""
    print(f"\n{result['pair']}, batch {result['batch']}; losses differ by {result['losses_differ_by']:.1e} at most")
    head = ["", "ms", "p20", "p80", "images/s", "MFU", "floor ms", "peak GiB"]
    rows = []
    for name, v in result["variants"].items():
        peak = v["peak_memory_bytes"] and v["peak_memory_bytes"] / 2**30
        rows.append([name, v["median"], v["p20"], v["p80"], v["images_per_s"], v["mfu"], v["floor_ms"], peak])
    harness.print_table(head, rows)
    names = [n for v in result["variants"].values() for n in v["parts"]]
    names = list(dict.fromkeys(names))
    if names:
        print("\nparts, ms (share)")
        rows = [
            [name, *(f"{p[n]['ms']:.1f} ({p[n]['share']:.0%})" if n in p else "-" for n in names)]
            for name, v in result["variants"].items()
            if (p := v["parts"])
        ]
        harness.print_table(["", *names], rows)
    print()
    predicted = result["predictions"] or {}
    rows = [[k, r["median"], r["p20"], r["p80"], predicted.get(k)] for k, r in result["ratios"].items()]
    harness.print_table(["times faster", "median", "p20", "p80", "expected"], rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", help=f"one of {', '.join(pairs.PAIRS)}")
    parser.add_argument("--recipe", help="a recipe of the library instead, with random weights")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16", help="of autocast")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="ours-fp32 published-fp32 ours-bf16 ...; all four, or those in fp32 on a CPU that emulates bf16",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--profile-repeats", type=int, default=2, help="steps of the pass that times parts; 0 leaves it out"
    )
    parser.add_argument("--ceiling-repeats", type=int, default=10)
    parser.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU, the trainer's setting of the C library's allocator; it holds for all variants",
    )
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args(argv)
    both = [f"{whose}-{dtype}" for dtype in (args.dtype, "fp32") for whose in ("ours", "published")]
    if args.variants is None:
        args.variants = both
        if torch.device(args.device).type == "cpu" and not cpu_computes_in(harness.DTYPES[args.dtype]):
            args.variants = [name for name in both if name.endswith("fp32")]
            print(f"{args.dtype} is left out: this CPU emulates it; --variants names what is measured", flush=True)
    if unknown := [name for name in args.variants if name not in both]:
        raise ValueError(f"variants has {unknown[0]!r}: it must be one of {', '.join(both)}.")
    return args


def main() -> None:
    try:
        args = parse()
        result = measure(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report(result)
    path = harness.results_dir(args.out) / f"step-{result['pair']}-{args.device.partition(':')[0]}.json"
    harness.write_json(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
