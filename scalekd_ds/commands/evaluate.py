"""Measures top-1 and top-5 of a consolidated file or any timm model: `scalekd evaluate MODEL --data DIR`."""

from __future__ import annotations

from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.errors import UserError


def parser() -> Parser:
    """The verb's options."""
    options = Parser("evaluate", "Top-1 and top-5 of a consolidated file or any timm model.")
    options.add_argument("model", help="a consolidated .safetensors with its card beside it, or a timm model's name")
    options.add_argument("--data", type=Path, required=True, help="validation images, one folder per class, or the "
                        "folder that holds them as val/")  # fmt: skip
    options.add_argument("--weights", default="pretrained", help="for a timm name: pretrained, none or a .safetensors")
    options.add_argument("--image-size", type=int, default=None, help="side in pixels; the model's own if not given")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--threads", type=int, default=2, help="decoding threads")
    options.add_argument("--logits", type=Path, default=None, help="also write all logits to this .safetensors")
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.threads < 1:
        raise UserError(f"--batch-size is {args.batch_size} and --threads {args.threads}: both must be at least 1.")

    from scalekd_ds.evaluation.standalone import evaluate_model

    result = evaluate_model(
        args.model, args.data, args.weights, args.image_size, args.batch_size, args.threads, args.logits
    )
    print(f"{args.model}: top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  ({result['images']} images)")
