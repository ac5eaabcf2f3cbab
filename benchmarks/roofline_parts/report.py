"""What the roofline prints: by part, by card, the largest gains, the difference of two traces, and a table for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness

from roofline_parts import cards, model
from roofline_parts.cards import CARDS, Card
from roofline_parts.cost import Kernel

GOAL_LAUNCHES, GOAL_RATIO = 500, 1.35


def on_card(found: dict[str, Any], card: Card, batch: int) -> dict[str, Any]:
    """What the model says of one card.

    Args:
        found: What `trace_step.find` returns.
        card: The card.
        batch: Images of the step.

    Returns:
        `eager`, `compiled` (None where it was not traced) and `floor`: milliseconds, images/s and milliseconds by part; for
        the first two the ten largest gains, too.
    """
    steps = {"eager": found["eager"], "compiled": None}
    if found["fused"] is not None:
        steps["compiled"] = model.compiled_step(found["eager"], found["fused"], found["update"])
    answer: dict[str, Any] = {}
    for name, kernels in steps.items():
        if kernels is None:
            answer[name] = None
            continue
        seconds, parts = model.step_seconds(kernels, card)
        device = sum(model.device_seconds(kernel, card) for kernel in kernels)
        answer[name] = _times(seconds, parts, batch) | {"device_ms": 1e3 * device, "gains": model.gains(kernels, card)}
    parts = model.floor(found["eager"], found["update_bytes"], card)
    return answer | {"floor": _times(sum(parts.values()), parts, batch)}


def _times(seconds: float, parts: dict[str, float], batch: int) -> dict[str, Any]:
    return {"ms": 1e3 * seconds, "images_per_s": batch / seconds, "parts": {p: 1e3 * s for p, s in parts.items()}}


def by_part(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Part -> launches, kernels, bytes and FLOP."""
    parts: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        part = parts.setdefault(kernel["part"], {"launches": 0, "kernels": 0, "bytes": 0, "flop": 0})
        times = kernel.get("count", 1)
        part["launches"] += kernel["launches"]
        part["kernels"] += kernel["kernels"]
        part["bytes"] += times * (kernel["read"] + kernel["written"])
        part["flop"] += times * kernel["flop"]
    return parts


def summary(found: dict[str, Any], names: Sequence[str], batch: int) -> dict[str, Any]:
    """All that is written as JSON, from both traces of a step: kernels in groups, sums by part, and each card."""
    steps = {"eager": found["eager"], "fused": found["fused"]}
    if found["fused"] is not None:
        steps["fused"] = model.compiled_step(found["eager"], found["fused"], found["update"])
    content: dict[str, Any] = {"update_bytes": found["update_bytes"], "trace_seconds": found["trace_seconds"]}
    content["launches"] = {name: sum(k["launches"] for k in ks) for name, ks in _named(steps).items()}
    content["parts"] = {name: by_part(ks) for name, ks in _named(steps).items()}
    content["cards"] = {name: on_card(found, CARDS[name], batch) for name in names}
    content["kernels"] = {name: _columns(model.grouped(ks)) for name, ks in _named(steps).items()}
    return content


def _named(steps: dict[str, Any]) -> dict[str, Any]:
    return {{"fused": "compiled"}.get(name, name): kernels for name, kernels in steps.items() if kernels is not None}


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ["part", "op", "shape", "count", "kernels", "launches", "read", "written", "flop", "unit", "must"]
    # a line for each kernel, as the JSON is read by people too
    return {"columns": " ".join(names), "rows": [" | ".join(str(row[name]) for name in names) for row in rows]}


def assumptions() -> dict[str, Any]:
    """The constants of the model."""
    numbers = {
        name.lower(): value for name, value in vars(cards).items() if name.isupper() and isinstance(value, int | float)
    }
    return numbers | {"cards": {name: vars(card) for name, card in CARDS.items()}}


def print_parts(content: dict[str, Any], card: str) -> None:
    """Each part of the step on one card."""
    found = content["cards"][card]
    steps = [name for name in ("eager", "compiled") if found[name]]
    parts = list(dict.fromkeys(part for name in steps for part in found[name]["parts"]))
    rows = []
    for part in parts:
        row: list[Any] = [part]
        for name in steps:
            sums = content["parts"][name].get(part, {"launches": 0, "bytes": 0})
            row += [int(sums["launches"]), sums["bytes"] / 1e9, found[name]["parts"].get(part, 0.0)]
        flop = content["parts"]["eager"].get(part, {"flop": 0})["flop"]
        rows.append([*row, found["floor"]["parts"].get(part, 0.0), flop / 1e12])
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(rows[0])))])
    head = [f"{name} {what}" for name in steps for what in ("launches", "GB", "ms")]
    print(f"\n{CARDS[card].name}, modelled")
    harness.print_table(["part", *head, "floor ms", "TFLOP"], rows)


def print_gains(content: dict[str, Any], card: str) -> None:
    """The kernels whose removal gains most."""
    for name in ("eager", "compiled"):
        found = content["cards"][card][name]
        if found:
            print(f"\nlargest gains on {CARDS[card].name}, {name}: milliseconds of the device")
            rows = [[f"{g['part']}: {g['op']}", g["shape"], g["count"], g["gain_ms"]] for g in found["gains"]]
            harness.print_table(["kernel", "shapes", "times", "ms"], rows)


def card_rows(content: dict[str, Any]) -> list[list[str]]:
    """A row for each card: launches, milliseconds and images/s, and how far from the floor."""
    rows = []
    for name, found in content["cards"].items():
        row, launches, floor = [CARDS[name].name], content["launches"], found["floor"]
        for step in ("eager", "compiled"):
            if found[step] is None:
                row += ["-"] * 4
                continue
            ratio = found[step]["ms"] / floor["ms"]
            row += [
                f"{launches[step]:,}",
                f"{found[step]['ms']:.1f}",
                f"{found[step]['images_per_s']:,.0f}",
                f"{ratio:.2f}",
            ]
        rows.append([*row, f"{floor['ms']:.1f}", f"{floor['images_per_s']:,.0f}"])
    return rows


_STEP = ("launches", "ms", "images/s", "of the floor")
CARD_HEAD = ["card", *(f"{step}: {what}" for step in ("eager", "compiled") for what in _STEP), "floor: ms", "images/s"]


def markdown(content: dict[str, Any]) -> str:
    """The tables of docs/performance.md: all cards, and the parts of the step on the first one."""
    name, found = next(iter(content["cards"].items()))
    steps = [step for step in ("eager", "compiled", "floor") if found[step]]
    parts = dict.fromkeys(part for step in steps for part in found[step]["parts"])
    rows = []
    for part in parts:
        ms = [found[step]["parts"].get(part, 0.0) for step in steps]
        if max(ms) >= 0.05:
            rows.append([{"else": "rest"}.get(part, part), *(f"{value:.1f}" for value in ms)])
    head = [f"ms on {CARDS[name].name}", *steps]
    return _table(CARD_HEAD, card_rows(content)) + "\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def print_against(content: dict[str, Any], other: dict[str, Any], card: str) -> None:
    """By part: another trace, this one, and the difference, in launches, bytes and milliseconds of a card."""
    for name in ("eager", "compiled"):
        before, after = other["cards"][card][name], content["cards"][card][name]
        if not before or not after:
            continue
        rows, none = [], {"launches": 0, "bytes": 0}
        for part in dict.fromkeys([*before["parts"], *after["parts"]]):
            old, new = other["parts"][name].get(part, none), content["parts"][name].get(part, none)
            ms = [step["parts"].get(part, 0.0) for step in (before, after)]
            launches = [int(old["launches"]), int(new["launches"])]
            gigabytes = [old["bytes"] / 1e9, new["bytes"] / 1e9]
            rows.append([part, *launches, *gigabytes, *ms, ms[1] - ms[0]])
        rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 8))])
        print(f"\n{CARDS[card].name}, {name}: the other trace and this one")
        harness.print_table(["part", "launches", "now", "GB", "now", "ms", "now", "difference"], rows)


def goals(content: dict[str, Any], card: str = "H100") -> str | None:
    """How far the compiled step is from what it is meant to reach on a card, in one line."""
    found = content["cards"].get(card)
    if not found or not found["compiled"]:
        return None
    launches, ratio = content["launches"]["compiled"], found["compiled"]["ms"] / found["floor"]["ms"]
    reached = launches <= GOAL_LAUNCHES and ratio <= GOAL_RATIO
    return (
        f"{CARDS[card].name}, compiled: {launches} launches (goal: {GOAL_LAUNCHES}), {ratio:.2f} of the floor's time "
        f"(goal: {GOAL_RATIO}): {'reached' if reached else 'not reached'}"
    )
