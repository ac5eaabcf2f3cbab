#!/usr/bin/env python3
"""Plain student weights from a checkpoint of any ZeRO stage: `launch/consolidate.py CKPT OUT.safetensors`."""

import argparse
from pathlib import Path

from scalekd_ds.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint is taken)")
    parser.add_argument("out", type=Path, help="the .safetensors file to write; its JSON card goes beside it")
    parser.add_argument(
        "--weights",
        choices=["student", "ema"],
        help="the student's own weights or their moving average; what the run ships if not given",
    )
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        raise UserError(f"OUT is {str(args.out)!r}: it must end in .safetensors.")

    from scalekd_ds.checkpoint import read_weights, resolve, weights_file, write_student
    from scalekd_ds.models import read_card

    file = weights_file(resolve(Path(args.checkpoint)), args.weights)
    state, card = read_weights(file), read_card(file)
    write_student(args.out, state, card)
    averaged = f" (average, decay {card['ema_decay']:g})" if card.get("ema_decay") else ""
    top1 = "not evaluated" if card["top1"] is None else f"top-1 {card['top1']:.2f}%"
    print(f"{args.out}: {card['architecture']}{averaged}, {len(state)} tensors, step {card['step']}, {top1}")


if __name__ == "__main__":
    run_cli(main)
