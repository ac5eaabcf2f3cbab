"""Teacher and student by torch.compile beside the eager ones: time, time to compile, and how far the results are apart."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pairs
import step_variants
import timing
import torch

from gpu_parts.step import PAIRS
from scalekd_ds.build import build_distiller


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if a compiled model fails, or its results are far from the eager one's."""
    device = timing.device_of("cpu" if dry else "cuda")
    end, found = time.monotonic() + seconds - 30.0, {"machine": harness.machine(device), "pairs": {}}
    for pair in ("tiny",) if dry else PAIRS:
        if time.monotonic() > end:
            found.setdefault("not_started", []).append(pair)
            continue
        found["pairs"][pair] = measure(pair, 2 if dry else 128, device, 1 if dry else 15, dry)
        save(found)
    wrong = [
        f"{pair}, {name}: {row.get('error') or row['difference']}"
        for pair, rows in found["pairs"].items()
        for name, row in rows.items()
        if "error" in row or row.get("difference", 0.0) > 0.05
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return found


def measure(pair: str, batch: int, device: torch.device, repeats: int, dry: bool) -> dict[str, dict[str, Any]]:
    """Milliseconds by name; a compiled model has also `compile_s` and `difference`, relative to the eager result."""
    # on a CPU, to generate and compile code would take minutes; the graphs are the same
    options = {"backend": "eager"} if dry else {}
    dtype = torch.float32 if dry else torch.bfloat16
    distiller = build_distiller(pairs.config_of(pair, None), step_variants.CLASSES, verbose=False).to(device).train()
    if not dry:
        distiller.teacher.lower_precision(dtype)
    images = torch.randn(batch, 3, *distiller.image_size, device=device)
    teachers = {"teacher": distiller.teacher, "teacher, compiled": copy.deepcopy(distiller.teacher).compile(**options)}
    students = {"student": distiller.student, "student, compiled": torch.compile(distiller.student, **options)}

    def targets(teacher: Any) -> torch.Tensor:
        return teacher.targets(images).logits

    def passes(student: Any) -> torch.Tensor:
        distiller.student.zero_grad()
        with torch.autocast(device.type, dtype, enabled=not dry):
            logits = student(images)
        logits.float().square().mean().backward()
        return logits.detach()

    calls = {name: lambda t=teacher: targets(t) for name, teacher in teachers.items()}
    calls |= {name: lambda s=student: passes(s) for name, student in students.items()}
    first, rows = {}, {}
    for name, call in calls.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            first[name] = call().float()
            timing.synchronise(device)
        except Exception as error:
            rows[name] = {"error": timing.one_line(error)}
            continue
        rows[name] = {"first_call_s": time.perf_counter() - begin}
    measured = timing.alternate({name: calls[name] for name in first}, device, repeats)
    for name, read in measured.items():
        rows[name] |= timing.summary(read)
        eager = name.removesuffix(", compiled")
        if eager != name and eager in first:
            apart = (first[name] - first[eager]).norm() / first[eager].norm()
            rows[name] |= {"difference": apart.item()}
            if "median" in rows[name] and "median" in rows[eager]:
                rows[name]["times_faster"] = timing.speedup(measured[eager].seconds, read.seconds)
    harness.print_table(
        [pair, "ms", "first call s", "difference"],
        [[name, row.get("median"), row.get("first_call_s"), row.get("difference")] for name, row in rows.items()],
    )
    return rows
