#!/usr/bin/env python3
"""Measures both kernels, forward and forward+backward, on the published recipes' shapes: `python benchmarks/kernels.py`.

They alternate with the published order of operations, lean eager PyTorch, torch.compile and, for attention, SDPA. All are
compared with the floor: the bytes that must move or the products that must be computed, over the ceilings that are measured
in the same run. On a GPU every call starts with a cold cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import harness
import published
import shapes
import torch
import torch.nn.functional as F

from scalekd_ds import kernels
from scalekd_ds.kernels.cross_attention import reference as attention_reference
from scalekd_ds.kernels.cross_attention import table

# predicted ms of forward and backward at batch 128 in bf16 on one H100 80GB, written before anything was measured. For the dual
# view they are passes over a tensor (8, or 14 for two stages; 22 compiled, 186 published) at 3.0 TB/s; for the attention they
# are those passes and its products
PREDICTIONS = {
    ("dual_view_loss", "swin_l"): {"library": 0.051, "compile": 0.14, "published": 1.19},
    ("dual_view_loss", "swin_l.both"): {"library": 0.09},
    ("dual_view_loss", "beit_l"): {"library": 0.179, "compile": 0.49, "published": 4.2},
    ("cap_attention", "swin_l.s3"): {"triton": 0.34, "sdpa": 0.52},
    ("cap_attention", "swin_l.s4"): {"triton": 0.155, "sdpa": 0.27},
    ("cap_attention", "beit_l-vit_b.s3"): {"triton": 0.58, "sdpa": 0.9},
}

DIRECTIONS = ("forward", "forward+backward")


def eager_dual_view(spatial: list[torch.Tensor], frequency: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """The loss in eager PyTorch, written with the identity that dropping the DC term is subtracting the mean.

    Args:
        spatial: (B, P, D) student tokens of the spatial view, one tensor for each stage.
        frequency: (B, P, D) student tokens of the frequency view, one tensor for each stage.
        t: (B, P, D) teacher tokens.

    Returns:
        (stages, 2) losses of both views.
    """
    t = t.float()
    t_unit, v_unit = F.normalize(t, dim=-1), F.normalize(t - t.mean(1, keepdim=True), dim=-1)
    losses = []
    for s, f in zip(spatial, frequency, strict=True):
        s, f = s.float(), f.float()
        u_unit = F.normalize(f - f.mean(1, keepdim=True), dim=-1)
        losses.append(torch.stack([(F.normalize(s, dim=-1) - t_unit).square().sum(), (u_unit - v_unit).square().sum()]))
    return torch.stack(losses) / len(t)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's fused attention, with the tensors in the library's layout (B, tokens, N, d)."""
    q = attention_reference.expand_groups(q, len(k))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def published_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(QK^T)V by separate operations, where every image has its own copy of the query."""
    return published.attention(*(x.flatten(2) for x in (q, k, v)), k.shape[2], scale)


def dual_view_calls(
    shape: shapes.DualView, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """Variant -> (forward, the tensors that get gradients)."""
    h, w = shape.grid

    def tokens() -> torch.Tensor:
        return torch.randn(batch, h * w, shape.channels, device=device).to(dtype)

    spatial, frequency = ([tokens().requires_grad_() for _ in range(shape.stages)] for _ in range(2))
    t, leaves, weights = tokens(), [*spatial, *frequency], [(1.0, 1.0)] * shape.stages
    t_map = t.transpose(1, 2).unflatten(2, (h, w)).contiguous()

    def as_published() -> torch.Tensor:
        losses = [published.spatial_loss(s, t_map, 1.0) for s in spatial]
        return torch.stack(losses + [published.frequency_loss(f, t_map, 1.0, 1) for f in frequency])

    calls = {
        "library": lambda: kernels.dual_view_loss(spatial, frequency, t, None, weights),
        "published": as_published,
        "eager": lambda: eager_dual_view(spatial, frequency, t),
    }
    if compiled:
        compile_once = torch.compile(eager_dual_view, dynamic=False)
        calls["compile"] = lambda: compile_once(spatial, frequency, t)
    return {name: (call, leaves) for name, call in calls.items()}


def attention_calls(
    shape: shapes.Attention, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """Variant -> (forward, the tensors that get gradients). Both views are stacked, so the batch is 2 B."""
    stacked = 2 * batch
    groups = 2 if shape.shared else stacked
    scale = 5.0 * shape.head_size**-0.5

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, shape.heads, shape.head_size, device=device).to(dtype).requires_grad_()

    q, q_each, kv = leaf(groups, shape.queries), leaf(stacked, shape.queries), leaf(stacked, shape.keys, 2)
    k, v = kv.unbind(2)
    calls = {
        "library": (lambda: kernels.cap_attention(q, k, v, scale), [q, kv]),
        "published": (lambda: published_attention(q_each, k, v, scale), [q_each, kv]),
        "eager": (lambda: attention_reference.cap_attention(q, k, v, scale), [q, kv]),
        "sdpa": (lambda: sdpa(q, k, v, scale), [q, kv]),
    }
    if compiled:
        compile_once = torch.compile(attention_reference.cap_attention, dynamic=False)
        calls["compile"] = (lambda: compile_once(q, k, v, scale), [q, kv])
    if device.type == "cuda":
        # measured besides `library`, which may call SDPA, so that the table of the faster one can be written
        from scalekd_ds.kernels.cross_attention import ops

        if ops.supports(shape.head_size, shape.queries, shape.keys, dtype):
            calls["triton"] = (lambda: ops.cap_attention(q, k, v, scale)[0], [q, kv])
    return calls


def calls_in(
    direction: str, calls: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]
) -> dict[str, Callable[[], Any]]:
    """Variant -> a call of its forward without a graph, or of forward and backward with a random upstream gradient."""
    if direction == "forward":
        return {name: torch.no_grad()(call) for name, (call, _) in calls.items()}
    upstream = {name: torch.randn_like(call().detach()) for name, (call, _) in calls.items()}

    def both(name: str) -> Callable[[], Any]:
        call, leaves = calls[name]
        return lambda: torch.autograd.grad(call(), leaves, upstream[name])

    return {name: both(name) for name in calls}


def extra_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs besides its inputs; None on a CPU."""
    peak = harness.peak_memory(call, device)
    return None if peak is None else peak - torch.cuda.memory_allocated(device)


def measure_shape(
    shape: shapes.DualView | shapes.Attention,
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
    build = dual_view_calls if isinstance(shape, shapes.DualView) else attention_calls
    # torch.compile stops compiling a function after a number of shapes
    torch.compiler.reset()
    calls = build(shape, args.batch, dtype, device, shape.name in args.compile)
    rows = []
    for direction in DIRECTIONS:
        steps = calls_in(direction, calls)
        seconds = harness.alternate(steps, device, args.repeats, warmup=3, flush=flush)
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
        for name, times in seconds.items():
            spread = harness.summary(times)
            row["variants"][name] = {
                **spread,
                "gb_per_s": work["bytes"] / spread["median"] / 1e6,
                "tflop_per_s": work["flop"] / spread["median"] / 1e9,
                "share_of_floor": row["floor_ms"] / spread["median"],
                "extra_memory_bytes": extra_memory(steps[name], device),
                "library_times_faster": harness.speedup(times, seconds["library"]),
            }
        rows.append(row)
    return rows


def predicted(
    shape: shapes.DualView | shapes.Attention, direction: str, args: argparse.Namespace, device: torch.device
) -> dict[str, float] | None:
    """The predicted milliseconds, or None: predictions are for forward and backward in bf16 at batch 128 on a GPU."""
    if (device.type, args.batch, args.dtype, direction) != ("cuda", 128, "bf16", "forward+backward"):
        return None
    return PREDICTIONS.get((shape.operation, shape.name))


def attention_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, str]:
    """Which of `triton` and `sdpa` is faster, forward and backward together, by the keys of the library's table."""
    picks = {}
    for row in rows:
        if row["direction"] != "forward+backward" or not {"triton", "sdpa"} <= row["variants"].keys():
            continue
        architecture, sizes = int(machine["sm"].replace(".", "")), row["sizes"]
        shape = (sizes["head_size"], sizes["queries"], sizes["keys"], sizes["shared"])
        triton, fused = (row["variants"][name]["median"] for name in ("triton", "sdpa"))
        key = table.key_of(architecture, *shape, harness.DTYPES[row["dtype"]])
        picks[key] = "triton" if triton < fused else "sdpa"
    return picks


def report(result: dict[str, Any]) -> None:
    """Prints a line for each operation, shape, direction and variant."""
    head = ["", "ms", "p20", "p80", "floor ms", "of floor", "GB/s", "TFLOP/s", "extra MiB", "library x", "predicted"]
    table = []
    for row in result["rows"]:
        for name, v in row["variants"].items():
            extra = v["extra_memory_bytes"]
            label = f"{row['operation']} {row['shape']} {row['direction']} {name}"
            cells = [v["median"], v["p20"], v["p80"], row["floor_ms"], f"{v['share_of_floor']:.0%}"]
            cells += [v["gb_per_s"], v["tflop_per_s"], extra and extra / 2**20, v["library_times_faster"]["median"]]
            table.append([label, *cells, (row["predicted_ms"] or {}).get(name)])
    harness.print_table(head, table)


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
    parser.add_argument("--write-table", action="store_true", help="put the attention's picks into the library's table")
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
    device = torch.device(args.device)
    torch.manual_seed(0)
    result = {
        "benchmark": "kernels",
        "machine": harness.machine(device),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "ceilings": harness.ceilings(device, args.ceiling_repeats, [args.dtype]),
        "rows": [],
    }
    for shape in shapes.ALL:
        if shape.name in args.shapes:
            result["rows"] += measure_shape(shape, args, device, result["ceilings"])
            save(result)
    return result


def main() -> None:
    try:
        args = parse()
        out = harness.results_dir(args.out)
        path = out / f"kernels-{args.device.partition(':')[0]}.json"
        result = measure(args, lambda so_far: harness.write_json(path, so_far))
    except ValueError as error:
        sys.exit(f"error: {error}")
    report(result)
    print(f"wrote {path}")
    if picks := attention_table(result["rows"], result["machine"]):
        harness.write_json(out / "attention-table.json", picks)
        if args.write_table:
            harness.write_json(table.PATH, dict(sorted((table.measured() | picks).items())))
            print(f"wrote {table.PATH}")


if __name__ == "__main__":
    main()
