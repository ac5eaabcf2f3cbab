#!/usr/bin/env python3
"""Measures the kernels, forward and forward+backward, on the published recipes' shapes: `python benchmarks/kernels.py`.

They alternate with the published order of operations, lean eager PyTorch, torch.compile and, for attention, SDPA. All are
compared with the floor: the bytes that must move or the products that must be computed, over the ceilings that are measured
in the same run. On a GPU every call is replayed from a CUDA graph where it can be captured, and starts with a cold cache. A
variant that raises is noted in its row. JSON and the attention's table are written after every shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import harness
import kernel_variants
import shapes
import timing
import torch
import update_variants

from scalekd_ds.kernels.cross_attention import table
from scalekd_ds.kernels.lamb import table as lamb_table
from scalekd_ds.kernels.window_attention import table as window_table

# predicted ms of forward and backward, or of an update, at batch 128 in bf16 on one H100 80GB, written before anything was
# measured. For the dual view they are passes over a tensor (8, or 14 for two stages; 22 compiled, 186 published) at 3.0 TB/s;
# for the attention they are those passes and its products
PREDICTIONS = {
    ("dual_view_loss", "swin_l"): {"library": 0.051, "compile": 0.14, "published": 1.19},
    ("dual_view_loss", "swin_l.both"): {"library": 0.09},
    ("dual_view_loss", "beit_l"): {"library": 0.179, "compile": 0.49, "published": 4.2},
    ("cap_attention", "swin_l.s3"): {"triton": 0.34, "sdpa": 0.52},
    ("cap_attention", "swin_l.s4"): {"triton": 0.155, "sdpa": 0.27},
    ("cap_attention", "beit_l-vit_b.s3"): {"triton": 0.58, "sdpa": 0.9},
    # 40 and 125 bytes for each weight at 2.95 TB/s
    ("lamb", "lamb"): {"triton": 2.0, "torch": 6.3},
}


def extra_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs besides its inputs; None on a CPU."""
    peak = timing.peak_memory(call, device)
    return None if peak is None else peak - torch.cuda.memory_allocated(device)


def measure_shape(
    shape: shapes.Shape,
    args: argparse.Namespace,
    device: torch.device,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """Measures one shape: a row of results for each direction.

    Args:
        shape: The shape.
        args: The command line arguments.
        device: Where to measure.
        ceilings: What the device reaches at most, from `harness.ceilings`.
    """
    dtype, flush = harness.DTYPES[args.dtype], harness.flush_buffer(device)
    build: Callable[..., dict[str, kernel_variants.Variant]] = {
        "dual_view_loss": kernel_variants.dual_view_calls,
        "cap_attention": kernel_variants.attention_calls,
        "window_attention": kernel_variants.window_calls,
        "lamb": update_variants.update_calls,
    }[shape.operation]
    # torch.compile stops compiling a function after a number of shapes
    torch.compiler.reset()
    calls = build(shape, args.batch, dtype, device, shape.name in args.compile)
    rows = []
    for direction in getattr(shape, "directions", kernel_variants.DIRECTIONS):
        steps = kernel_variants.calls_in(direction, calls)
        readings = timing.alternate(steps, device, args.repeats, warmup=3, flush=flush, launched="ahead")
        work = shape.work(args.batch, dtype.itemsize, direction)
        floors = {
            "bytes": work["bytes"] / ceilings["copy_bytes_per_s"],
            "flop": work["flop"] / ceilings[f"matmul_flop_per_s/{args.dtype}"],
        }
        bound = max(floors, key=floors.get)
        row = {
            "operation": shape.operation,
            "shape": shape.name,
            "sizes": shape.sizes(args.batch),
            "direction": direction,
            "dtype": args.dtype,
            **work,
            "bound": bound,
            "floor_ms": 1e3 * floors[bound],
            "variants": {},
            "predicted_ms": predicted(shape, direction, args, device),
        }
        for name, read in readings.items():
            spread = row["variants"][name] = timing.summary(read)
            if read.error is None:
                spread |= {
                    "gb_per_s": work["bytes"] / spread["median"] / 1e6,
                    "tflop_per_s": work["flop"] / spread["median"] / 1e9,
                    "share_of_floor": row["floor_ms"] / spread["median"],
                    "extra_memory_bytes": extra_memory(steps[name], device),
                }
                if readings["library"].error is None:
                    spread["library_times_faster"] = timing.speedup(read.seconds, readings["library"].seconds)
        rows.append(row)
    return rows


def predicted(
    shape: shapes.Shape,
    direction: str,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, float] | None:
    """The predicted milliseconds, or None: predictions are for whole passes in bf16 at batch 128 on a GPU."""
    if (device.type, args.batch, args.dtype) != ("cuda", 128, "bf16") or direction == "forward":
        return None
    return PREDICTIONS.get((shape.operation, shape.name))


def attention_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, str]:
    """Which of `triton` and `sdpa` is faster, forward and backward together, by the keys of the library's table."""
    picks = {}
    for row in rows:
        measured = {name for name, variant in row["variants"].items() if "error" not in variant}
        if row.get("operation") == "window_attention":
            continue
        if row["direction"] != "forward+backward" or not {"triton", "sdpa"} <= measured:
            continue
        architecture, sizes = int(machine["sm"].replace(".", "")), row["sizes"]
        shape = (sizes["head_size"], sizes["queries"], sizes["keys"], sizes["shared"])
        triton, fused = (row["variants"][name]["median"] for name in ("triton", "sdpa"))
        key = table.key_of(architecture, *shape, harness.DTYPES[row["dtype"]])
        picks[key] = "triton" if triton < fused else "sdpa"
    return picks


def windows_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, str]:
    """The same of window attention, whose keys have a direction; the shapes of one key are summed."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        measured = {name for name, variant in row["variants"].items() if "error" not in variant}
        if row.get("operation") != "window_attention" or not {"triton", "sdpa"} <= measured:
            continue
        architecture, sizes = int(machine["sm"].replace(".", "")), row["sizes"]
        shape = (sizes["head_size"], sizes["window"] ** 2, sizes["shifted"], row["direction"] != "forward")
        key = window_table.key_of(architecture, *shape, harness.DTYPES[row["dtype"]])
        both = sums.setdefault(key, [0.0, 0.0])
        for i, name in enumerate(("triton", "sdpa")):
            both[i] += row["variants"][name]["median"]
    return {key: "triton" if triton < fused else "sdpa" for key, (triton, fused) in sums.items()}


def report(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each operation, shape, direction and variant."""
    head = [
        "",
        "ms",
        "p20",
        "p80",
        "floor ms",
        "of floor",
        "GB/s",
        "TFLOP/s",
        "extra MiB",
        "library x",
        "predicted",
        "by",
    ]
    table, failed = [], []
    for row in rows:
        for name, v in row["variants"].items():
            label = f"{row['operation']} {row['shape']} {row['direction']} {name}"
            if "error" in v:
                failed.append(f"{label}: {v['error']}")
                continue
            extra, faster = v["extra_memory_bytes"], v.get("library_times_faster", {}).get("median")
            cells = [v["median"], v["p20"], v["p80"], row["floor_ms"], f"{v['share_of_floor']:.0%}"]
            cells += [v["gb_per_s"], v["tflop_per_s"], extra and extra / 2**20, faster]
            by = v["timed_by"] + ("" if v.get("host_ahead", True) else ", host late")
            table.append([label, *cells, (row["predicted_ms"] or {}).get(name), by])
    harness.print_table(head, table)
    for line in failed:
        print(f"left out: {line}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line, where defaults depend on the device.

    Raises:
        ValueError: A shape is unknown.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, help="images; 128 on a GPU, 4 on a CPU")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="of shapes.py; all on a GPU, the smallest on a CPU")
    parser.add_argument("--repeats", type=int, help="rounds over all variants; 50 on a GPU, 5 on a CPU")
    parser.add_argument("--compile", nargs="*", metavar="NAME", help="shapes with torch.compile; some on a GPU")
    parser.add_argument("--write-table", action="store_true", help="put the picks into the library's tables")
    parser.add_argument("--ceiling-repeats", type=int, default=10)
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    defaults = {
        "batch": 128 if gpu else 4,
        "dtype": "bf16" if gpu else "fp32",
        "shapes": [s.name for s in shapes.ALL] if gpu else ["swin_l", "swin_l.s4", "swin_l.s3"],
        "repeats": 50 if gpu else 5,
        # not all, since each takes seconds to compile for both directions
        "compile": ["swin_l", "swin_l.both", "beit_l", "swin_l.s3", "swin_l.s4", "beit_l-vit_b.s3"] if gpu else [],
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = [s.name for s in shapes.ALL]
    for flag in ("shapes", "compile"):
        if unknown := [name for name in getattr(args, flag) if name not in known]:
            raise ValueError(f"{flag} has {unknown[0]!r}: it must be one of {', '.join(known)}.")
    return args


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures all shapes.

    Args:
        args: The command line arguments.
        save: Called with the results so far after each shape, so that a run that is interrupted leaves its rows.

    Returns:
        The results, ready for JSON.
    """
    device = timing.device_of(args.device)
    torch.manual_seed(0)
    result = {
        "benchmark": "kernels",
        "machine": harness.machine(device),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "ceilings": harness.ceilings(device, args.ceiling_repeats, [args.dtype]),
        "rows": [],
    }
    # those with a prediction first: a run may be cut short
    for shape in sorted(shapes.ALL, key=lambda shape: (shape.operation, shape.name) not in PREDICTIONS):
        if shape.name in args.shapes:
            with harness.without_tf32() if args.dtype == "fp32" else nullcontext():
                rows = measure_shape(shape, args, device, result["ceilings"])
            result["rows"] += rows
            report(rows)
            save(result)
    return result


def json_path(out: Path, device: str) -> Path:
    """The file of the results in the folder `out`."""
    return out / f"kernels-{device.partition(':')[0]}.json"


def save_to(out: Path, args: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """A function that writes the results so far into the folder `out`, and the attentions' picks with them."""

    def save(result: dict[str, Any]) -> None:
        harness.write_json(json_path(out, args.device), result)
        if picks := attention_table(result["rows"], result["machine"]):
            harness.write_json(out / "attention-table.json", picks)
            if args.write_table:
                harness.write_json(table.PATH, dict(sorted((table.measured() | picks).items())))
        if picks := windows_table(result["rows"], result["machine"]):
            harness.write_json(out / "windows-table.json", picks)
            if args.write_table:
                harness.write_json(window_table.PATH, dict(sorted((window_table.measured() | picks).items())))
        if picks := update_variants.update_table(result["rows"], result["machine"]):
            harness.write_json(out / "lamb-table.json", picks)
            if args.write_table:
                harness.write_json(lamb_table.PATH, dict(sorted((lamb_table.measured() | picks).items())))

    return save


def main() -> None:
    try:
        args = parse()
        out = harness.results_dir(args.out)
        measure(args, save_to(out, args))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {json_path(out, args.device)}")


if __name__ == "__main__":
    main()
