"""What becomes of the numbers of `step.py`: against the ceilings, merged from several processes, and as tables."""

from __future__ import annotations

import copy
from typing import Any

import harness


def largest_difference(losses: dict[str, dict[str, float]]) -> float:
    """Of any term between any two variants, relative to the term."""
    terms = [list(values) for values in zip(*(found.values() for found in losses.values()), strict=True)]
    return max(((max(values) - min(values)) / max(map(abs, values)) for values in terms), default=0.0)


def against_ceilings(result: dict[str, Any]) -> None:
    """Puts images/s, MFU and floor beside each time, from the FLOP and the ceilings that are known so far."""
    flop = (result["flop_per_image"] or 0.0) * result["batch"]
    for name, variant in result["variants"].items():
        ceiling = result["ceilings"][f"matmul_flop_per_s/{name.partition('-')[2]}"]
        for found in (variant, variant.get("without_optimizer", {})):
            if "median" in found:
                seconds = found["median"] / 1e3
                found["images_per_s"] = result["batch"] / seconds
                found["mfu"] = flop / seconds / ceiling if flop else None
                found["floor_ms"] = 1e3 * flop / ceiling if flop else None


def ours_of(names: list[str]) -> str:
    """The variant of ours that the others are compared with: the one in 16 bits where it is measured."""
    return next((name for name in names if name.startswith("ours-") and name != "ours-fp32"), "ours-fp32")


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several processes' with different variants; ratios across processes are those of their medians."""
    whole = copy.deepcopy(results[0])
    for other in results[1:]:
        for key in ("losses", "variants", "ratios", "ratios_without_optimizer"):
            whole[key] |= other[key]
        common = {name: value for name, value in whole["ceilings"].items() if name in other["ceilings"]}
        whole["ceilings"] |= other["ceilings"] | harness.higher(common, other["ceilings"])
        whole["flop_per_image"] = whole["flop_per_image"] or other["flop_per_image"]
    whole["losses_differ_by"] = largest_difference(whole["losses"])
    ours = ours_of(list(whole["variants"]))
    for key, part in (("ratios", lambda v: v), ("ratios_without_optimizer", lambda v: v.get("without_optimizer", {}))):
        medians = {n: part(v)["median"] for n, v in whole["variants"].items() if "median" in part(v)}
        for name, median in medians.items():
            if ours in medians and name != ours and f"{ours}/{name}" not in whole[key]:
                whole[key][f"{ours}/{name}"] = {"median": median / medians[ours], "p20": None, "p80": None}
    against_ceilings(whole)
    return whole


def report(result: dict[str, Any]) -> None:
    """The tables of one run."""
    print(f"\n{result['pair']}, batch {result['batch']}; losses differ by {result['losses_differ_by']:.1e} at most")
    head = ["", "ms", "p20", "p80", "host ms", "images/s", "MFU", "floor ms", "peak GiB"]
    rows = []
    for name, v in result["variants"].items():
        for label, found in ((name, v), (f"{name}, no optimizer", v.get("without_optimizer", {}))):
            if "error" in found:
                print(f"{label} is left out: {found['error']}")
            elif found:
                peak = v.get("peak_memory_bytes") if label == name else None
                cells = [found["median"], found["p20"], found["p80"], found.get("host_ms"), found["images_per_s"]]
                rows.append([label, *cells, found["mfu"], found["floor_ms"], peak and peak / 2**30])
    harness.print_table(head, rows)
    names = list(dict.fromkeys(n for v in result["variants"].values() for n in v.get("parts", {})))
    if names:
        print("\nparts, ms (share)")
        rows = [
            [name, *(f"{p[n]['ms']:.1f} ({p[n]['share']:.0%})" if n in p else "-" for n in names)]
            for name, v in result["variants"].items()
            if (p := v.get("parts"))
        ]
        harness.print_table(["", *names], rows)
    print()
    predicted = result["predictions"] or {}
    rows = [[k, r["median"], r["p20"], r["p80"], predicted.get(k)] for k, r in result["ratios"].items()]
    rows += [
        [f"{k}, no optimizer", r["median"], r["p20"], r["p80"], None]
        for k, r in result["ratios_without_optimizer"].items()
    ]
    harness.print_table(["times faster", "median", "p20", "p80", "expected"], rows)
