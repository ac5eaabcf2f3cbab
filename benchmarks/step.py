#!/usr/bin/env python3
"""The whole distillation step, ours against the published structure: `python benchmarks/step.py --pair swin_small-resnet50`.

Variants run in turn in one process, on the same weights, images and optimizer: `ours-fp32`, `published-fp32` (as the
published scripts run), and both under the same autocast, `ours-bf16` and `published-bf16`. Precision, memory formats and the
host's allocator are set by the library's own calls, as its trainer makes them. Every step is timed with the optimizer and
without it. On a GPU each precision has a process of its own, 16 bits first, so that memory that does not suffice for float32
costs no other result. JSON is written after every stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pairs
import parts
import step_results
import step_variants
import timing
import torch
from step_variants import Variant
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.engine.cpu_precision import cpu_computes_in
from scalekd_ds.engine.host_memory import keep_freed_memory

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


@torch.no_grad()
def losses_of(variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Every variant's losses on the same weights; one that raises says so when it is timed."""
    losses = {}
    for name, variant in variants.items():
        if (found := attempted(variant.forward)) is not None:
            losses[name] = {term: value.item() for term, value in found.items()}
    return losses


def attempted(call: Callable[[], Any]) -> Any:
    """What the call returns, or None where it raises: memory may not suffice for every variant and measurement."""
    try:
        return call()
    except Exception as error:
        print(f"left out: {timing.one_line(error)}", flush=True)
        return None


def memory_of(variants: dict[str, Variant], device: torch.device) -> dict[str, int | None]:
    """Peak memory of each variant's step, without the teachers that only other variants use."""
    teachers = {name: {id(p): p.nbytes for p in v.distiller.teacher.parameters()} for name, v in variants.items()}
    total = sum({k: n for held in teachers.values() for k, n in held.items()}.values())
    peaks = {}
    for name, variant in variants.items():
        peak = attempted(lambda step=variant.step: timing.peak_memory(step, device))
        peaks[name] = None if peak is None else peak - (total - sum(teachers[name].values()))
    return peaks


def flop_of(step: Callable[[], Any]) -> int:
    """FLOP of one step: products, convolutions and PyTorch's attention, forward and backward.

    Attention in the library's own kernels is not seen; it is less than a hundredth of a step.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def timed(
    calls: dict[str, Callable[[], None]], args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """(milliseconds of each variant, how many times faster ours is than each of the others)."""
    readings = timing.alternate(calls, device, args.repeats, args.warmup)
    seconds = {name: read.seconds for name, read in readings.items() if read.error is None}
    compared = [(step_results.ours_of(args.variants), other) for other in seconds] + [("ours-fp32", "published-fp32")]
    ratios = {
        f"{ours}/{other}": timing.speedup(seconds[other], seconds[ours])
        for ours, other in dict.fromkeys(compared)
        if ours != other and {ours, other} <= seconds.keys()
    }
    return {name: timing.summary(read) for name, read in readings.items()}, ratios


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures all variants in this process.

    Args:
        args: The command line arguments.
        save: Called with the results so far after each stage, so that a run that is interrupted leaves them.

    Returns:
        The results, ready for JSON.
    """
    device = timing.device_of(args.device)
    torch.manual_seed(0)
    if device.type == "cpu" and args.keep_freed_memory:
        keep_freed_memory()
    variants, optimizer = step_variants.build_variants(args, device)
    precisions = list(dict.fromkeys(name.partition("-")[2] for name in args.variants))
    ours = step_results.ours_of(args.variants)
    result: dict[str, Any] = {
        "benchmark": "step",
        "machine": harness.machine(device),
        "pair": args.pair or args.recipe,
        "batch": args.batch,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "variants", "argv")},
        "ceilings": harness.ceilings(device, args.ceiling_repeats, precisions),
        "losses": losses_of(variants),
        "predictions": PREDICTIONS.get((args.pair, device.type)),
        "variants": {},
        "ratios": {},
        "ratios_without_optimizer": {},
    }
    result["losses_differ_by"] = step_results.largest_difference(result["losses"])
    flop = attempted(lambda: flop_of(variants[ours].step)) if ours in variants else None
    result["flop_per_image"] = flop and flop / args.batch
    save(result)
    steps = {name: variant.step for name, variant in variants.items()}
    result["variants"], result["ratios"] = timed(steps, args, device)
    step_results.against_ceilings(result)
    save(result)
    passes = {name: variant.passes for name, variant in variants.items()}
    without, result["ratios_without_optimizer"] = timed(passes, args, device)
    for name, found in without.items():
        result["variants"][name]["without_optimizer"] = found
    step_results.against_ceilings(result)
    save(result)
    memory = memory_of(variants, device)
    for name, found in result["variants"].items():
        variant, repeats = variants[name], args.profile_repeats
        profile = attempted(
            lambda n=name, v=variant, r=repeats: parts.profile(n, v.step, v.distiller, optimizer, device, r)
        )
        found |= {"peak_memory_bytes": memory[name], "parts": profile or {}}
        save(result)
    result["ceilings"] = harness.higher(result["ceilings"], harness.ceilings(device, args.ceiling_repeats, precisions))
    step_results.against_ceilings(result)
    save(result)
    return result


def measure_apart(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """`measure` with a process for each precision; a process that fails leaves what it had written.

    Raises:
        ValueError: No process measured anything.
    """
    results, failed = [], {}
    with tempfile.TemporaryDirectory() as made:
        for precision in dict.fromkeys(name.partition("-")[2] for name in args.variants):
            names = [name for name in args.variants if name.endswith(f"-{precision}")]
            out = Path(made) / precision
            # the later of two equal flags counts
            command = [sys.executable, __file__, *args.argv, "--no-apart", "--out", str(out), "--variants", *names]
            status = subprocess.run(command).returncode
            if (path := json_path(out, args)).is_file():
                results.append(json.loads(path.read_text()))
            if status:
                failed[precision] = f"status {status}"
            if results:
                save(step_results.merged(results) | {"failed": failed})
    if not results:
        raise ValueError(f"no variant of {', '.join(args.variants)} could be measured.")
    return step_results.merged(results) | {"failed": failed}


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
    parser.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        help="a process for each precision; the default on a GPU, where one of them may need too much memory",
    )
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.apart is None:
        args.apart = torch.device(args.device).type == "cuda"
    both = [f"{whose}-{dtype}" for dtype in (args.dtype, "fp32") for whose in ("ours", "published")]
    if args.variants is None:
        args.variants = both
        if torch.device(args.device).type == "cpu" and not cpu_computes_in(harness.DTYPES[args.dtype]):
            args.variants = [name for name in both if name.endswith("fp32")]
            print(f"{args.dtype} is left out: this CPU emulates it; --variants names what is measured", flush=True)
    if unknown := [name for name in args.variants if name not in both]:
        raise ValueError(f"variants has {unknown[0]!r}: it must be one of {', '.join(both)}.")
    return args


def json_path(out: Path, args: argparse.Namespace) -> Path:
    """The file of the results in the folder `out`."""
    return out / f"step-{args.pair or args.recipe}-{args.device.partition(':')[0]}.json"


def main() -> None:
    try:
        args = parse()
        # before anything is measured
        pairs.config_of(args.pair, args.recipe)
        path = json_path(harness.results_dir(args.out), args)
        result = (measure_apart if args.apart else measure)(args, lambda so_far: harness.write_json(path, so_far))
    except ValueError as error:
        sys.exit(f"error: {error}")
    harness.write_json(path, result)
    step_results.report(result)
    print(f"wrote {path}")
    if result.get("failed"):
        sys.exit(f"error: {', '.join(f'{name} ({why})' for name, why in result['failed'].items())} did not finish.")


if __name__ == "__main__":
    main()
