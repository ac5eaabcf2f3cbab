"""Teachers as replicas and sharded, one after the other on the same ranks: outputs, gradients, bytes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from deepspeed import comm as dist
from ranks import own_arguments

from scalekd_ds.config import TeacherPlacement
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.engine.teacher_placement import held_bytes, place_teacher
from scalekd_ds.plan.memory import Layout, teacher_bytes
from scalekd_ds.plan.teacher_size import teacher_size
from scalekd_ds.teacher import Teacher
from scalekd_ds.teacher_cache.headless import headless_teacher, teacher_parts

CLASSES, BATCH, STEPS = 7, 2, 3
# shrunk by their constructors; matrices that three ranks do not divide among them
TEACHERS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 48, "depths": [1, 2], "num_heads": [3, 6], "window_size": 4},
    ),
    "beit": ("beitv2_base_patch16_224", {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [24, 48, 96, 192]}),
}


def built(name: str, seed: int) -> Teacher:
    torch.manual_seed(seed)
    model, kwargs = TEACHERS[name]
    size = None if "img_size" in kwargs else 64
    return Teacher(model, weights="none", input_size=size, num_classes=CLASSES, **kwargs)


class Peak:
    """The most bytes of the teacher's weights on this rank, looked at whenever one of its modules runs."""

    def __init__(self, teacher: Teacher) -> None:
        self.bytes = 0

        def look(*_: object) -> None:
            self.bytes = max(self.bytes, held_bytes(teacher))

        for module in teacher.modules():
            # after ZeRO's own hooks, so that the module's parameters are there
            module.register_forward_pre_hook(look)


def distiller_of(teacher: Teacher) -> ScaleKD:
    torch.manual_seed(1)
    student = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 16, 16], num_classes=CLASSES)
    return ScaleKD(student, teacher, image_size=64, verbose=False)


def three_steps(distiller: ScaleKD) -> dict[str, torch.Tensor]:
    """Three SGD steps of a student with projectors, targets, and the last stage's input gradient."""
    teacher = distiller.teacher
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    torch.manual_seed(2 + dist.get_rank())
    out = {}
    for step in range(STEPS):
        images, labels = torch.randn(BATCH, 3, 64, 64), torch.randint(CLASSES, (BATCH,))
        losses = distiller(images, labels)
        losses["loss/total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        out |= {f"{name} {step}": value.detach() for name, value in losses.items()}
    tokens = torch.randn(BATCH, teacher.last_input.grid[0] * teacher.last_input.grid[1], teacher.last_input.dim)
    tokens.requires_grad_()
    last = teacher.last_stage(tokens)
    last.float().square().sum().backward()
    targets = teacher(images)
    out |= {"tokens": targets.tokens, "logits": targets.logits, "last stage": last.detach(), "gradient": tokens.grad}
    return out | {name: p.detach() for name, p in distiller.named_parameters()}


def layout_of(placement: TeacherPlacement) -> Layout:
    return Layout.of({}, dist.get_world_size(), placement)


def compare(name: str, placement: TeacherPlacement, low: bool) -> dict[str, object]:
    device = start_processes()
    found = {}
    for where in ("replica", placement):
        # ranks other than the first build other weights: rank 0's are the ones that are sharded
        teacher = built(name, 0 if where == "replica" else dist.get_rank())
        distiller = distiller_of(teacher)
        if low:
            teacher.lower_precision(torch.bfloat16)
        weights, buffers = (sum(t.nbytes for t in tensors) for tensors in (teacher.parameters(), teacher.buffers()))
        planned = teacher_bytes(SimpleNamespace(teacher=teacher_size(distiller)), layout_of(where))
        place_teacher(teacher, where, device)
        resting, peak = held_bytes(teacher), Peak(teacher)
        found[where] = three_steps(distiller), weights + buffers, resting + buffers, peak, planned, buffers
    expected, seen = found["replica"][0], found[placement][0]
    _, whole, resting, peak, planned, buffers = found[placement]
    return {
        "differ": [key for key in expected if not torch.equal(expected[key], seen[key])],
        "compared": len(expected),
        "replica": found["replica"][2],
        "whole": whole,
        "buffers": buffers,
        "resting": resting,
        "peak": peak.bytes + buffers,
        "planned": planned,
    }


def compare_headless(name: str, placement: TeacherPlacement, low: bool) -> dict[str, object]:
    """Three steps with the last stage alone, placed, and with the whole teacher, whose targets both are given."""
    device = start_processes()
    whole = built(name, 0)
    # ranks other than the first have other weights: rank 0's are the ones that are sharded
    ours = headless_teacher(*teacher_parts(built(name, dist.get_rank())))
    distillers = [distiller_of(teacher) for teacher in (whole, ours)]
    for teacher in (whole, ours):
        if low:
            teacher.lower_precision(torch.bfloat16)
    weights = sum(p.nbytes for p in ours.parameters())
    place_teacher(ours, placement, device)
    resting, found = held_bytes(ours), []
    for distiller in distillers:
        optimizer, out = torch.optim.SGD(distiller.parameters(), 0.1), {}
        torch.manual_seed(2 + dist.get_rank())
        for step in range(STEPS):
            images, labels = torch.randn(BATCH, 3, 64, 64), torch.randint(CLASSES, (BATCH,))
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses = distiller(images, labels, distillers[0].teacher_targets(images))
            losses["loss/total"].backward()
            optimizer.step()
            optimizer.zero_grad()
            out |= {f"{loss} {step}": value.detach() for loss, value in losses.items()}
        found.append(out | {parameter: p.detach() for parameter, p in distiller.named_parameters()})
    return {
        "differ": [key for key in found[0] if not torch.equal(found[0][key], found[1][key])],
        "compared": len(found[0]),
        "weights": weights,
        "resting": resting,
        "afterwards": held_bytes(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=[], help="teacher,placement,dtype")
    args = parser.parse_args(own_arguments())
    results: dict[str, object] = {}
    for case in args.cases:
        name, placement, dtype = case.split(",")
        compared = compare_headless if name.startswith("headless-") else compare
        results[case] = compared(name.removeprefix("headless-"), placement, dtype == "bf16")
    (args.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
