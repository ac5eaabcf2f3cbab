"""LAMB on CUDA tensors without a GPU, by PyTorch's operations and by the kernels: launches, syncs and copies, as JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import fake_cuda
import timm
import torch
from fake_cuda.engine import make_state
from roofline_parts.update import trace_update

from scalekd_ds.kernels.lamb import launch, table, triton_kernels
from scalekd_ds.optim.lamb import Lamb


class Addresses:
    """Addresses of tensors without values, whose gradients lie elsewhere in every step, or where they were."""

    def __init__(self, moves: bool) -> None:
        self.moves, self.calls = moves, 0

    def __call__(self, tensors: list[torch.Tensor]) -> list[int]:
        self.calls += 1
        return [512 * (number + self.moves * self.calls) for number in range(len(tensors))]


def steps(shapes: list[torch.Size], moves: bool) -> dict:
    """The second step; without weight decay for layers of one dimension."""
    parameters = [torch.nn.Parameter(torch.empty(shape, device="cuda:1")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    decay, free = ([p for p in parameters if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = Lamb([{"params": decay, "weight_decay": 0.02}, {"params": free, "weight_decay": 0.0}], lr=0.01)
    watch = fake_cuda.Watch()
    fake_cuda.count_kernels(watch, triton_kernels)
    with mock.patch.object(launch, "addresses_of", Addresses(moves)):
        with fake_cuda.Watch():
            optimizer.step()
        watch.launches.clear()
        watch.operations.clear()
        with watch, watch.part("lamb"):
            optimizer.step()
    found = {name: dict(getattr(watch, name)) for name in ("launches", "syncs", "copies")}
    return found | {"kernels": {name: n for name, n in watch.operations.items() if name.endswith("_kernel")}}


def modelled(shapes: list[torch.Size]) -> dict:
    """What the roofline makes of the same step: bytes of each kernel of ours, and launches."""
    layers = torch.nn.ParameterList(torch.empty(shape, device="cuda") for shape in shapes)
    decay, free = ([p for p in layers if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer, ema = (
        Lamb([{"params": decay}, {"params": free, "weight_decay": 0.0}]),
        SimpleNamespace(update=lambda: None),
    )
    with fake_cuda.Watch():
        make_state(layers, optimizer, ema)
    kernels = trace_update(layers, optimizer, ema)
    ours = [
        [k["op"], k["read"], k["written"], k["must"]] for k in kernels if k["op"] in ("advance_kernel", "apply_kernel")
    ]
    held = [sum(p.numel() for p in group) for group in (decay, free)]
    return {"kernels": ours, "launches": sum(k["launches"] for k in kernels), "elements": held}


def main() -> None:
    with torch.device("meta"):
        shapes = [p.shape for p in timm.create_model("resnet50").parameters()]
    fake_cuda.pretend()
    with fake_cuda.tensors():
        found = {"torch": steps(shapes, False)}
        measured = dict.fromkeys((table.key_of(90, flat) for flat in (False, True)), "triton")
        with mock.patch.object(table, "measured", lambda: measured):
            found |= {"triton": steps(shapes, False), "triton, gradients elsewhere": steps(shapes, True)}
        found["modelled"] = modelled(shapes)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
