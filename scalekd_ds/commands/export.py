"""Exports a student for other tools: `scalekd export --format timm|hf|onnx|torchscript|torch_export CKPT_OR_FILE OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import on_cpu
from scalekd_ds.export import FORMATS, export
from scalekd_ds.names import escape


def parser() -> Parser:
    """The verb's options."""
    listed = "\n".join(f"  {name:<13} {format.about}" for name, format in FORMATS.items())
    options = Parser(
        "export",
        "Writes a student into a folder for other tools, with a model card, and checks that it gives the same logits.",
        f"formats:\n{listed}",
    )
    # not argparse's `choices`, whose error would not suggest the nearest name
    given: Any = options.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    given.completer = _complete_format
    options.add_argument(
        "source", metavar="CKPT_OR_FILE", help="a run's folder, a checkpoint's, or a consolidated .safetensors"
    )
    options.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    options.add_argument(
        "--weights",
        choices=["student", "ema"],
        help="of a checkpoint: the student's own weights or their moving average; what the run ships if not given",
    )
    options.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="the program takes pixels in [0, 1], and has mean and std inside (not for timm and hf, whose config has them)",
    )
    options.add_argument("--overwrite", action="store_true", help="replace a folder that an export wrote")
    return options


def _complete_format(**_: object) -> list[str]:
    return list(FORMATS)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    on_cpu()
    done = export(args.source, args.out, args.format, args.weights, args.with_preprocessing, args.overwrite)
    print(
        f"{escape(done.folder)}: {done.architecture} as {args.format}, logits within {done.difference:.1g} of the student's"
    )
