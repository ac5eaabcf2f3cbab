"""Measures top-1 and top-5 of a consolidated file or any timm model: `scalekd evaluate MODEL --data DIR`."""

from __future__ import annotations

from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import without_chatter
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape


def parser() -> Parser:
    """The verb's options."""
    options = Parser("evaluate", "Top-1 and top-5 of a consolidated file or any timm model.")
    options.add_argument("model", help="a run's folder, a checkpoint's, a .safetensors with its card, or a timm name")
    options.add_argument("--data", required=True, help="validation images in any form that training takes: class folders, "
                        "tars, TFRecords, a table, hf:NAME:SPLIT; or the folder that holds them as val/")  # fmt: skip
    options.add_argument("--allow-missing-classes", action="store_true", help="the images may lack some classes")
    options.add_argument("--weights", default="pretrained", help="for a timm name: pretrained, none or a .safetensors")
    options.add_argument("--image-size", type=int, default=None, help="side in pixels; the model's own if not given")
    options.add_argument("--eval-resize", type=int, default=None, help="shorter side before the centre crop in pixels; "
                        "as in training if not given, in proportion at another size")  # fmt: skip
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--threads", type=int, default=None, help="decoding threads; from the cores if not given")
    options.add_argument("--max-bad-share", type=float, default=0.001, metavar="X", help="share of the images that may be "
                        "left out because they cannot be used, rounded up to an image (0.001)")  # fmt: skip
    options.add_argument("--logits", type=Path, default=None, help="also write all logits to this .safetensors")
    return options


def _file_of_run(model: str) -> str:
    """The plain weights of a run's or a checkpoint's folder, which the other verbs take too; any other name as it is."""
    from scalekd_ds.checkpoint.layout import checkpoints_of, resolve_checkpoint
    from scalekd_ds.checkpoint.manifest import MANIFEST
    from scalekd_ds.checkpoint.plain_weights import weights_file

    folder = Path(model)
    if not model or not folder.is_dir() or not ((folder / MANIFEST).is_file() or checkpoints_of(folder)):
        return model
    return str(weights_file(resolve_checkpoint(folder)))


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    without_chatter()
    for name, value in ("batch-size", args.batch_size), ("threads", args.threads):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be at least 1.")
    if not 0.0 <= args.max_bad_share <= 1.0:
        raise UserError(f"--max-bad-share is {args.max_bad_share:g}: it must be a share, 0 to 1.")
    for name in ("image_size", "eval_resize"):
        value, least = getattr(args, name), 8 if name == "image_size" else args.image_size or 8
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least} pixels.")
    from scalekd_ds.evaluation.standalone import evaluate_model

    result = evaluate_model(
        _file_of_run(args.model),
        args.data,
        args.weights,
        args.image_size,
        args.batch_size,
        args.threads,
        args.logits,
        args.eval_resize,
        args.allow_missing_classes,
        args.max_bad_share,
    )
    left_out = f", {result['left_out']} left out" if result["left_out"] else ""
    print(
        f"{escape(args.model)}: top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  ({result['images']} images{left_out})"
    )
