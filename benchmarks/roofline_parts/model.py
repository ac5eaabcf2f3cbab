"""Turns the kernels of a step into time on a card: eager, compiled, and the floor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from roofline_parts.cards import COMPILED_HOST_US, COPY_SHARE, EAGER_HOST_US, GAP_US, Card
from roofline_parts.cost import Kernel

# parts that nothing compiles
UNCOMPILED = ("optimizer", "else", "data_wait")
_SUMMED = ("kernels", "launches")


def grouped(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Kernels of the same part, operator, shapes, bytes and FLOP as one row, with how many they are (`count`)."""
    rows: dict[tuple, dict[str, Any]] = {}
    for kernel in kernels:
        key = tuple(value for name, value in kernel.items() if name not in _SUMMED)
        row = rows.setdefault(key, dict(kernel) | {"count": 0, "kernels": 0, "launches": 0})
        row["count"] += 1
        for name in _SUMMED:
            row[name] += kernel[name]
    return list(rows.values())


def device_seconds(kernel: Kernel, card: Card) -> float:
    """Time of a kernel on the device, with the gap before it."""
    return card.seconds(kernel) + kernel["kernels"] * GAP_US * 1e-6


def floor_seconds(kernel: Kernel, card: Card) -> float:
    """What the floor keeps of a kernel, see `floor`; 0 for one that a neighbour could take in."""
    return 0.0 if kernel["must"] is None else card.seconds(kernel, moved=kernel["must"])


def step_seconds(kernels: Sequence[Kernel], card: Card) -> tuple[float, dict[str, float]]:
    """Time of a step, in which the host launches ahead of the device until it has to wait for it.

    Host and device are two clocks. A kernel begins when the one before it has ended, and not before the host has launched
    it; a kernel for whose result the host waits sets the host's clock to the device's. The second of two steps is taken,
    since the host enters it with the lead, or the lag, that the first one left.

    Returns:
        Seconds, and seconds by part, whose sum it is.
    """
    host = device = 0.0
    parts: dict[str, float] = {}
    for _ in range(2):
        parts = {}
        for kernel in kernels:
            compiled = kernel.get("compiled", False)
            host += kernel["launches"] * (COMPILED_HOST_US if compiled else EAGER_HOST_US) * 1e-6
            begin = device
            device = max(device, host) + device_seconds(kernel, card)
            if kernel["waits"]:
                host = device
            parts[kernel["part"]] = parts.get(kernel["part"], 0.0) + device - begin
    return sum(parts.values()), parts


def compiled_step(
    eager: Sequence[Kernel], fused: Sequence[Kernel], update: Sequence[Kernel] | None = None
) -> list[Kernel]:
    """The step whose teacher, student, projectors and losses are compiled, in its order; the rest as in the eager one.

    Args:
        eager: The eager step.
        fused: What inductor makes of its parts.
        update: The optimizer's part on the library's kernels; None where it is that of the eager step.
    """
    backward = [k for k in fused if k["part"].startswith("backward")]
    forward = [k for k in fused if not k["part"].startswith("backward")]
    rest = [k for k in eager if k["part"] in UNCOMPILED]
    if update is not None:
        before = next((i for i, k in enumerate(rest) if k["part"] == "optimizer"), len(rest))
        kept = [[k for k in part if k["part"] != "optimizer"] for part in (rest[:before], rest[before:])]
        rest = [*kept[0], *update, *kept[1]]
    return [k | {"compiled": True} for k in (*forward, *reversed(backward))] + rest  # type: ignore[misc]


def floor(eager: Sequence[Kernel], update_bytes: int, card: Card) -> dict[str, float]:
    """The least time of a step by part: FLOP and bytes that no fusion of kernels takes away, and no launch.

    - Each matrix product, convolution and attention of the step as it is traced, forward and backward, takes the slower of its
      FLOP at the achievable rate and of its operands and results, each distinct tensor once and in the type that it is held
      in. So weights, inputs, outputs and saved activations are read by those that need them.
    - Everything else is free, as if it ran inside of such a neighbour: norms, activations, residual sums, casts, copies.
    - The scores of an attention, fused or not, are no traffic, and neither are masks and biases of a fused one.
    - Our own loss kernels read and write each of their tensors once.
    - The update reads each gradient once, and reads and writes each weight, each moment and the student's average once.
    """
    parts: dict[str, float] = {}
    for kernel in eager:
        if kernel["must"] is not None:
            parts[kernel["part"]] = parts.get(kernel["part"], 0.0) + floor_seconds(kernel, card)
    parts["optimizer"] = update_bytes / (card.gb_s * 1e9 * COPY_SHARE)
    return parts


def gains(kernels: Sequence[Kernel], card: Card, count: int = 10) -> list[dict[str, Any]]:
    """The groups of kernels whose removal gains most device time.

    A product gains what it takes beyond the floor: its launch, and the traffic of scores that a fused attention has not.

    Returns:
        Rows of `grouped`, by part, operator and shape, with `gain_ms`.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for kernel in kernels:
        key = (kernel["part"], kernel["op"], kernel["shape"])
        row = found.setdefault(key, {"part": key[0], "op": key[1], "shape": key[2], "count": 0, "gain_ms": 0.0})
        row["count"] += kernel["kernels"]
        row["gain_ms"] += 1e3 * (device_seconds(kernel, card) - floor_seconds(kernel, card))
    return sorted(found.values(), key=lambda row: -row["gain_ms"])[:count]
