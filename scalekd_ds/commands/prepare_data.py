"""Writes Fashion-MNIST as image folders, or checks that images can be decoded.

`scalekd prepare-data fashion-mnist runs/fashion-mnist`, `scalekd prepare-data verify DIR`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.names import escape, one_line


def fashion_mnist(args: argparse.Namespace) -> None:
    """Writes Fashion-MNIST as image folders, unless they are there already."""
    from scalekd_ds.data import fashion

    existing = fashion.describe_existing(args.out, args.limit)
    if existing is not None:
        print(f"{escape(args.out)} is there already: {existing}")
        return
    sets, classes, origin = fashion.find(args.source, args.download)
    print(f"{escape(args.out)}: {fashion.write(args.out, sets, classes, origin, args.limit)}")


def verify(args: argparse.Namespace) -> None:
    """Decodes every image, and writes the list of those that training leaves out."""
    from scalekd_ds.data import verify as data
    from scalekd_ds.data.sources.open import open_source

    where = Path(args.dir)
    is_hub = args.dir.startswith("hf:")
    places = [folder for name in ("train", "val") if (folder := where / name).is_dir()] or [args.dir]
    # a function of the classes, since a part of a data set may have a single one
    sources = [open_source(source, "verify", lambda names: None) for source in places]
    flaws = {name: reason for source in sources for name, reason in data.find_flaws(source, args.workers).items()}
    for name, reason in sorted(flaws.items()):
        print(one_line(f"{escape(name)} {reason}"))
    found = f"{len(flaws)} of {sum(map(len, sources))} images cannot be used"
    if is_hub:
        print(f"{found}: training replaces each by another one of its class")
        return
    # beside a table or a shard, since that folder is the data.root of a run
    listed = data.write_quarantine(where if where.is_dir() else where.parent, flaws)
    print(f"{found}: {escape(listed)}, which training leaves out")


def parser() -> Parser:
    """The verb's options."""
    options = Parser("prepare-data", "Puts data in place, and checks it.")
    commands = options.add_subparsers(dest="command", required=True, metavar="WHAT", parser_class=Parser)
    fashion = commands.add_parser("fashion-mnist", help="Fashion-MNIST as a JPEG ImageFolder with train/ and val/")
    fashion.add_argument("out", type=Path, help="the folder to write")
    fashion.add_argument("--source", type=Path, default=None, help="folder with the four idx files, gzipped or not")
    fashion.add_argument("--download", action="store_true", help="fetch it by torchvision where it is not on the disk")
    fashion.add_argument(
        "--limit", type=int, default=None, help="only this many images of each set, even over the classes"
    )
    fashion.set_defaults(run=fashion_mnist)
    check = commands.add_parser("verify", help="decode every image below DIR and list the ones that cannot be used")
    check.add_argument(
        "dir", help="the folder that is given to training as --data.root, or a table, a shard or hf:NAME:SPLIT in it"
    )
    check.add_argument("--workers", type=int, default=None, help="threads; one per core if not given")
    check.set_defaults(run=verify)
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)
