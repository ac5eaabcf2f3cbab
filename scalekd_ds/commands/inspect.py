"""Draws a contact sheet of attention, feature maps and predictions: `scalekd inspect CKPT IMAGES --out PNG`."""

from __future__ import annotations

from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import without_chatter
from scalekd_ds.errors import UserError
from scalekd_ds.names import one_line


def parser() -> Parser:
    """The verb's options."""
    options = Parser(
        "inspect",
        "One PNG of attention, feature maps, predictions and frequencies: of a student, its teacher and a baseline.",
    )
    options.add_argument(
        "checkpoint", help="a run's folder, a checkpoint's, a .safetensors with its card, or a timm name"
    )
    options.add_argument(
        "images",
        nargs="+",
        help="folders, files, quoted globs or sources of training; folders named as classes say the truth",
    )
    options.add_argument("--out", type=Path, default=Path("inspect.png"), help="the PNG to write (inspect.png)")
    options.add_argument("--images", dest="count", type=int, default=8, metavar="N", help="rows of the sheet (8)")
    options.add_argument(
        "--pick",
        choices=["spread", "lost"],
        default="spread",
        help="spread: evenly over the folders; lost: first what the student alone gets wrong, of all IMAGES",
    )
    models = options.add_argument_group("models")
    # the names of training's options are accepted too, since errors about missing weights mention them
    models.add_argument(
        "--weights", "--student_weights", default="pretrained", help="of a timm CKPT: pretrained, none or a file"
    )
    models.add_argument(
        "--of-run", choices=["student", "ema"], help="which weights of a run; what it ships if not given"
    )
    models.add_argument("--teacher", help="as CKPT, or none; the run's own teacher if not given")
    models.add_argument(
        "--teacher-weights",
        "--teacher_weights",
        default="pretrained",
        help="of a timm name: pretrained, none or a file",
    )
    models.add_argument("--baseline", help="as CKPT: a student of the same classes to compare with")
    models.add_argument("--baseline-weights", default="pretrained", help="of a timm name: pretrained, none or a file")
    models.add_argument("--size", type=int, help="side of the images in pixels; that of training if not given")
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    without_chatter()
    if args.count < 1:
        raise UserError(f"--images is {args.count}: it must be at least 1.")
    if args.size is not None and args.size < 8:
        raise UserError(f"--size is {args.size}: it must be at least 8 pixels.")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out is {str(args.out)!r}: it must end in .png.")

    from scalekd_ds.inspection.sheet import check_matplotlib

    check_matplotlib()
    from scalekd_ds.inspection.compose import inspect

    for line in inspect(args):
        print(one_line(line))
