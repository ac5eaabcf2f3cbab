#!/usr/bin/env python3
"""Puts data in place, and checks it: `launch/prepare_data.py fashion-mnist runs/fashion-mnist`, `... verify DIR`."""

import argparse
from pathlib import Path

from scalekd_ds.errors import run_cli


def fashion_mnist(args: argparse.Namespace) -> None:
    from scalekd_ds.data import fashion

    held = fashion.finished(args.out, args.limit)
    if held is not None:
        print(f"{args.out} is there already: {held}")
        return
    sets, classes, origin = fashion.find(args.source, args.download)
    print(f"{args.out}: {fashion.write(args.out, sets, classes, origin, args.limit)}")


def verify(args: argparse.Namespace) -> None:
    from scalekd_ds.data import verify as data
    from scalekd_ds.data.source import open_source

    folders = [folder for name in ("train", "val") if (folder := args.dir / name).is_dir()] or [args.dir]
    sources = [open_source(folder, "verify") for folder in folders]
    flaws = {name: reason for source in sources for name, reason in data.find_flaws(source, args.workers).items()}
    for name, reason in sorted(flaws.items()):
        print(f"{name} {reason}")
    listed = data.write_quarantine(args.dir, flaws)
    print(f"{len(flaws)} of {sum(map(len, sources))} images cannot be used: {listed}, which training leaves out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fashion = commands.add_parser("fashion-mnist", help="Fashion-MNIST as a JPEG ImageFolder with train/ and val/")
    fashion.add_argument("out", type=Path, help="the folder to write")
    fashion.add_argument("--source", type=Path, default=None, help="folder with the four idx files, gzipped or not")
    fashion.add_argument("--download", action="store_true", help="fetch it by torchvision where it is not on the disk")
    fashion.add_argument(
        "--limit", type=int, default=None, help="only this many images of each set, even over the classes"
    )
    fashion.set_defaults(run=fashion_mnist)
    check = commands.add_parser("verify", help="decode every image below DIR and list the ones that cannot be used")
    check.add_argument("dir", type=Path, help="the folder that is given to training as --data.root")
    check.add_argument("--workers", type=int, default=None, help="threads; one a core")
    check.set_defaults(run=verify)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
