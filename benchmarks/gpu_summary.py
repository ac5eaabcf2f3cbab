"""The most important figures of the parts of `gpu.py`, beside what was predicted."""

from __future__ import annotations

from typing import Any

import harness

Rows = list[list[Any]]


def rows_of_correct(found: dict[str, Any]) -> Rows:
    """Counts of the tests."""
    return [["tests passed", found["passed"], None], ["tests failed", len(found["failed_tests"]), 0]]


def rows_of_step(found: dict[str, Any]) -> Rows:
    """Each pair in 16 bits: ratios with the optimizer and without it, images/s, MFU and memory."""
    rows = []
    for pair, results in found["pairs"].items():
        for precision, result in results.items():
            expected = result["predictions"] or {}
            for name, ratio in result["ratios"].items():
                rows.append([f"step {pair} {name}, times faster", ratio["median"], expected.get(name)])
            for name, ratio in result["ratios_without_optimizer"].items():
                rows.append([f"step {pair} {name}, no optimizer, times faster", ratio["median"], None])
            ours, theirs = (result["variants"].get(f"{whose}-{precision}", {}) for whose in ("ours", "published"))
            if "median" not in ours:
                rows.append([f"step {pair} ours-{precision}: {ours.get('error', 'not measured')}", None, None])
                continue
            rows.append([f"step {pair} ours-{precision}, images/s", ours["images_per_s"], None])
            rows.append([f"step {pair} ours-{precision}, ms", ours["median"], None])
            rows.append([f"step {pair} ours-{precision}, host ms", ours.get("host_ms"), None])
            is_16_bits = precision != "fp32"
            rows.append(
                [f"step {pair} ours-{precision}, MFU", ours["mfu"], expected.get("mfu") if is_16_bits else None]
            )
            without = ours.get("without_optimizer", {})
            rows.append([f"step {pair} ours-{precision}, no optimizer, MFU", without.get("mfu"), None])
            if ours.get("peak_memory_bytes") and theirs.get("peak_memory_bytes"):
                memory = "peak memory, ours/published"
                ratio = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
                rows.append([f"step {pair} {precision} {memory}", ratio, expected.get(memory) if is_16_bits else None])
    return rows


def rows_of_kernels(found: dict[str, Any]) -> Rows:
    """Forward and backward of each shape."""
    rows = []
    for row in found["rows"]:
        name, variants = f"{row['operation']} {row['shape']}", row["variants"]
        ours, expected = variants.get("library", {}), row["predicted_ms"] or {}
        if row["direction"] != "forward+backward" or "median" not in ours:
            continue
        rows.append([f"{name}, ms by {ours['timed_by']}", ours["median"], expected.get("library")])
        rows.append([f"{name}, share of floor", ours["share_of_floor"], None])
        for other in ("published", "compile", "sdpa"):
            if "library_times_faster" in variants.get(other, {}):
                faster = variants[other]["library_times_faster"]["median"]
                rows.append([f"{name}, times faster than {other}", faster, None])
        if "median" in variants.get("triton", {}) and "median" in variants.get("sdpa", {}):
            # the library may not have called Triton, if its attention table did not have this shape before
            triton, sdpa = variants["triton"]["median"], variants["sdpa"]["median"]
            rows.append([f"{name}, triton ms", triton, expected.get("triton")])
            rows.append([f"{name}, triton times faster than sdpa", sdpa / triton, None])
    return rows


def rows_of_train(found: dict[str, Any]) -> Rows:
    """How exactly a killed run resumed, and the run's speed."""
    rows = []
    for name, result in found["exactness"].items():
        for what in ("losses", "weights"):
            if what in result:
                expected = 0.0 if name == "deterministic" else None
                rows.append(
                    [f"{what} of a resumed run, {name}, max difference", result[what]["max_difference"], expected]
                )
    logged = found.get("scalars", {})
    names = ("system/images_per_s", "system/share_data_wait", "system/mfu", "loss/total", "val/top1")
    return rows + [[f"train {name}", logged[name], None] for name in names if name in logged]


def rows_of_loader(found: dict[str, Any]) -> Rows:
    """Images/s of each augmentation."""
    return [[f"loader {row['loader']}, images/s", row.get("images_per_s"), None] for row in found["rows"]]


def rows_of_compile(found: dict[str, Any]) -> Rows:
    """How many times faster compiled models are."""
    return [
        [f"{pair} {name}, times faster", row["times_faster"]["median"], None]
        for pair, rows in found["pairs"].items()
        for name, row in rows.items()
        if "times_faster" in row
    ]


ROWS = {
    "correct": rows_of_correct,
    "train": rows_of_train,
    "step": rows_of_step,
    "kernels": rows_of_kernels,
    "loader": rows_of_loader,
    "compile": rows_of_compile,
}


def print_summary(results: dict[str, dict[str, Any]]) -> None:
    """Prints what this run has measured; a part that failed early has nothing to show."""
    rows: Rows = []
    for name, found in results.items():
        try:
            rows += ROWS[name](found)
        # a part that ended in the middle lacks fields: what it has is in its JSON
        except KeyError as field:
            rows.append([f"{name}: {found['status']}, without {field}", None, None])
    if rows:
        harness.print_table(["", "measured", "expected"], rows)
