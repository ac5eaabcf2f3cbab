"""How fast can a whole distillation step be: by its launches, bytes and FLOP, without a GPU.

A step of a pair is traced on CUDA tensors without values (`fake_cuda`), eager and as inductor fuses it. Each kernel takes
the slower of its bytes at an achievable share of a card's bandwidth and its FLOP at one of its rate, and a gap before it; the
host launches ahead, each launch in its own time. `roofline_parts/cards.py` has these figures, and `floor` of
`roofline_parts/model.py` says what the floor is: what no fusion takes away.

It is a model: caches, occupancy, clocks and the choice of kernels are not in it, and nothing that it prints was measured.

    python benchmarks/roofline.py                                    # Swin-L -> ResNet-50, batch 128, bf16, all cards
    python benchmarks/roofline.py --against benchmarks/results/roofline-swin_large-resnet50.json    # what a change does
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fake_cuda
import harness
import pairs
import torch
from roofline_parts import report
from roofline_parts.cards import CARDS

HERE = Path(__file__).resolve().parent


def trace(args: argparse.Namespace) -> dict[str, Any]:
    """What `roofline_parts.trace_step.find` returns, from a process that takes this machine for one with a GPU.

    Raises:
        RuntimeError: It cannot be had here, or the process failed.
    """
    reason = fake_cuda.available()
    if reason:
        raise RuntimeError(f"a step cannot be traced here: {reason}.")
    asked = {name: getattr(args, name) for name in ("pair", "recipe", "batch", "dtype", "teacher_precision")}
    asked["fuse"] = not args.eager_only
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "roofline_parts" / "trace_step.py"), json.dumps(asked)]
        environment = fake_cuda.environment(Path(folder))
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    answer = next((line for line in done.stdout.splitlines() if line.startswith('{"eager"')), None)
    if done.returncode or answer is None:
        raise RuntimeError(f"the trace failed:\n{done.stderr[-3000:]}")
    return json.loads(answer)


def read(path: str) -> dict[str, Any]:
    """A result of this script.

    Raises:
        ValueError: It is none.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["benchmark"] == "roofline":
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no result of benchmarks/roofline.py: give the JSON that it has written.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", help=f"one of {', '.join(pairs.PAIRS)} (default: swin_large-resnet50)")
    parser.add_argument("--recipe", help="a recipe of the library in place of a pair")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="autocast's (default: bf16)")
    parser.add_argument(
        "--teacher-precision",
        choices=("autocast", "bf16"),
        default="autocast",
        help="as --run.teacher_precision of a run",
    )
    parser.add_argument("--card", nargs="+", choices=list(CARDS), default=list(CARDS), help="default: all of them")
    parser.add_argument(
        "--eager-only", action="store_true", help="leave out what inductor makes, most of the script's time"
    )
    parser.add_argument("--json", help="print this result of an earlier call in place of a new trace")
    parser.add_argument("--against", help="print the difference from this result, by part")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/performance.md alone")
    parser.add_argument("--out", help="folder of the JSON (default: $OUT, else benchmarks/results)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}: it must be at least 1.")
    if args.pair is None and args.recipe is None:
        args.pair = "swin_large-resnet50"
    return args


def result(args: argparse.Namespace) -> dict[str, Any]:
    """A new trace, with its head."""
    # a name that is not known ends here, and not in the other process
    pairs.config_of(args.pair, args.recipe)
    found = trace(args)
    head = {
        "benchmark": "roofline",
        "is_model": "nothing here was measured on a GPU",
        "pair": args.pair or args.recipe,
        "batch": args.batch,
        "dtype": args.dtype,
        "teacher_precision": args.teacher_precision,
        "machine": harness.machine(torch.device("cpu")),
        "assumptions": report.assumptions(),
    }
    return head | report.summary(found, args.card, args.batch)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        other = read(args.against) if args.against else None
        content = read(args.json) if args.json else result(args)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.markdown:
        print(report.markdown(content), end="")
        return 0
    shown = [name for name in args.card if name in content["cards"]]
    print(f"{content['pair']}, batch {content['batch']}, {content['dtype']}: a model, nothing was measured")
    for name in shown:
        report.print_parts(content, name)
        report.print_gains(content, name)
    print()
    harness.print_table(report.CARD_HEAD, report.card_rows(content))
    print(report.goals(content) or "")
    if other is not None:
        for name in [name for name in shown if name in other["cards"]]:
            report.print_against(content, other, name)
    if not args.json:
        other_teacher = "" if args.teacher_precision == "autocast" else f"-teacher-{args.teacher_precision}"
        path = harness.results_dir(args.out) / f"roofline-{content['pair']}{other_teacher}.json"
        harness.write_json(path, content)
        print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
