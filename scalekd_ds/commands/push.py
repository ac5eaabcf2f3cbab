"""Publishes a student on a Hugging Face hub: `scalekd push RUN OWNER/NAME`."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import on_cpu
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape

# release of huggingface_hub, as in setup.py
OLDEST = (1, 16)


def parser() -> Parser:
    """The verb's options."""
    options = Parser(
        "push",
        "Uploads the student of a finished run to a Hugging Face hub, with a model card, as a repository that timm loads.",
        "The token is that of `hf auth login`, or HF_TOKEN. README.md, config.json, model.json and model.safetensors go\n"
        "up, and nothing else. --dry-run writes and lists them; to publish words of your own, edit the README.md of that\n"
        "folder, and push the folder.",
    )
    options.add_argument(
        "source",
        type=Path,
        metavar="RUN",
        help="folder of a finished run, or one that `scalekd export --format timm` wrote",
    )
    options.add_argument("name", metavar="OWNER/NAME", help="the repository, which is made where it is missing")
    options.add_argument("--license", metavar="ID", help="identifier of the licence, such as apache-2.0, for the card")
    options.add_argument("--private", action="store_true", help="nobody but the owner sees the repository")
    options.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made where it is missing (main)")
    options.add_argument("--message", metavar="TEXT", help="message of the commit")
    options.add_argument("--endpoint", metavar="URL", help="address of another hub; HF_ENDPOINT if not given")
    options.add_argument(
        "--dry-run",
        action="store_true",
        help="write the folder and list what would go up, without a token or a network",
    )
    options.add_argument(
        "--out", type=Path, metavar="OUT", help="with --dry-run: the folder to write (exported/NAME if not given)"
    )
    options.add_argument(
        "--overwrite", action="store_true", help="with --dry-run: replace a folder that an export wrote"
    )
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not args.dry_run and (args.out or args.overwrite):
        raise UserError("--out and --overwrite are for --dry-run, which writes a folder: leave them out, or add it.")
    _check_library()
    on_cpu()
    # after DeepSpeed has been told to use the CPU
    from scalekd_ds.export.hub import describe, push

    if args.dry_run:
        out = args.out or Path("exported", args.name.rpartition("/")[2])
        done = describe(args.source, args.name, args.license, out, args.overwrite)
        print(f"{escape(out)}: what would go to {args.name}")
    else:
        done = push(args.source, args.name, args.license, args.private, args.revision, args.message, args.endpoint)
        at = f"@{args.revision}" if args.revision else ""
        print(f"{done.url}: timm.create_model('hf-hub:{args.name}{at}', pretrained=True) loads it")
    for file, size in done.files.items():
        print(f"  {file:<20}{_in_units(size):>10}")
    if done.ignored:
        print(f"  left at home: {', '.join(map(escape, done.ignored))}")
    if done.license is None:
        print(
            "no licence is given, without which nobody else may use the weights: --license apache-2.0, or what the teacher's "
            "weights and the images allow"
        )


def _check_library() -> None:
    """Raises UserError where the hub's library is missing, or is older than the one that keeps to --endpoint throughout."""
    try:
        found = version("huggingface_hub")
    except PackageNotFoundError:
        found = ""
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        lacks = f"and this is {found}" if found else "which is missing"
        needed = ".".join(map(str, OLDEST))
        raise UserError(
            f"push needs huggingface_hub {needed} or newer, {lacks}: pip install 'scalekd_ds[hub]' installs it."
        )


def _in_units(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
