#!/usr/bin/env python3
"""Trains a student: `deepspeed --hostfile launch/hosts launch/train.py --recipe NAME [--dotted.key value ...]`."""

from scalekd_ds.errors import run_cli


def main() -> None:
    # parsed before the heavy imports, so that a typing error answers at once
    from scalekd_ds.cli import parse_run

    parsed = parse_run()
    if parsed is None:
        return
    cfg, dump = parsed
    if dump is not None:
        from scalekd_ds.checkpoint import write_json

        write_json(dump, cfg.as_dict())
        print(f"wrote {dump}: start it with --config {dump}")
        return
    from scalekd_ds.trainer import train

    train(cfg)


if __name__ == "__main__":
    run_cli(main)
