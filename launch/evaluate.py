#!/usr/bin/env python3
"""Top-1 and top-5 of a consolidated file or any timm model: `launch/evaluate.py MODEL --data DIR`."""

import argparse
from pathlib import Path

from scalekd_ds.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a consolidated .safetensors with its card beside it, or a timm model's name")
    parser.add_argument("--data", type=Path, required=True, help="validation images, one folder per class, or the "
                        "folder that holds them as val/")  # fmt: skip
    parser.add_argument("--weights", default="pretrained", help="for a timm name: pretrained, none or a .safetensors")
    parser.add_argument("--image-size", type=int, default=None, help="pixels; the model's own by default")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--logits", type=Path, default=None, help="also write all logits to this .safetensors")
    args = parser.parse_args()
    if args.batch_size < 1 or args.threads < 1:
        raise UserError(f"--batch-size is {args.batch_size} and --threads {args.threads}: both must be at least 1.")

    from scalekd_ds.standalone import evaluate_model

    result = evaluate_model(
        args.model, args.data, args.weights, args.image_size, args.batch_size, args.threads, args.logits
    )
    print(f"{args.model}: top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  ({result['images']} images)")


if __name__ == "__main__":
    run_cli(main)
