"""Writes plain student weights from a checkpoint of any ZeRO stage: `scalekd consolidate CKPT OUT.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd_ds.commands.parser import Parser
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape


def parser() -> Parser:
    """The verb's options."""
    options = Parser(
        "consolidate", "Plain student weights from a checkpoint of any ZeRO stage, with their JSON card beside them."
    )
    options.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint is taken)")
    options.add_argument("out", type=Path, help="the .safetensors file to write; its JSON card goes beside it")
    options.add_argument(
        "--weights",
        choices=["student", "ema"],
        help="the student's own weights or their moving average; what the run ships if not given",
    )
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.out.suffix != ".safetensors":
        raise UserError(f"OUT is {str(args.out)!r}: it must end in .safetensors.")

    from scalekd_ds.checkpoint.layout import of_checkpoint
    from scalekd_ds.checkpoint.plain_weights import read_weights, weights_file, write_student
    from scalekd_ds.models.card import read_card

    def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        file = weights_file(checkpoint, args.weights)
        return read_weights(file), read_card(file)

    state, card = of_checkpoint(Path(args.checkpoint), read)
    write_student(args.out, state, card)
    averaged = f" (average, decay {card['ema_decay']:g})" if card.get("ema_decay") else ""
    top1 = "not evaluated" if card["top1"] is None else f"top-1 {card['top1']:.2f}%"
    print(f"{escape(args.out)}: {card['architecture']}{averaged}, {len(state)} tensors, step {card['step']}, {top1}")
