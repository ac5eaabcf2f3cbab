"""LAMB on CUDA tensors without a GPU: launches, host syncs and copies of a step, as JSON."""

from __future__ import annotations

import json

import fake_cuda
import timm
import torch

from scalekd_ds.optim.lamb import Lamb

fake_cuda.pretend()
with fake_cuda.tensors():
    parameters = [torch.nn.Parameter(p.detach().to("cuda")) for p in timm.create_model("resnet50").parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Lamb(parameters, lr=0.01, weight_decay=0.02)
    with fake_cuda.Watch():
        optimizer.step()
    with fake_cuda.Watch() as watch, watch.part("lamb"):
        optimizer.step()
print(
    "RESULT " + json.dumps({"launches": dict(watch.launches), "syncs": dict(watch.syncs), "copies": dict(watch.copies)})
)
