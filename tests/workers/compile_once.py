"""Compiles a small model as a run does, takes a step, and prints how many graphs were found in the cache and how many not."""

from __future__ import annotations

import json

import torch
from torch import nn
from torch._dynamo.utils import counters

from scalekd_ds.engine import compilation

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
model.compile(**compilation.options(False))
with compilation.naming_the_compiler("all"):
    model(torch.ones(2, 3, 8, 8)).sum().backward()
found = counters["inductor"]
print("RESULT " + json.dumps({kind: found[f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")}))
