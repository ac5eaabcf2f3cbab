"""Traces the step of a tiny pair, and a small MLP eager and fused, as JSON; a process of `fake_cuda.environment`."""

from __future__ import annotations

import json
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import fake_cuda
import torch
from roofline_parts import report
from roofline_parts.fused import Fused
from roofline_parts.scores import Scores
from roofline_parts.trace import Trace
from roofline_parts.trace_step import find
from torch import nn
from torch.func import functional_call

from scalekd_ds.engine.processes import start_processes


def mlp() -> dict:
    """An MLP with a norm, under autocast."""
    # there is no attention to be found, and its patterns take longer to build than all the rest
    torch._inductor.config.pattern_matcher = False
    with fake_cuda.tensors():
        module = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).cuda()
        x = torch.empty(512, 256, device="cuda", requires_grad=True)
        with Trace() as trace, trace.part("mlp"), torch.autocast("cuda", torch.bfloat16):
            module(x)
        fused = Fused(Scores(), Trace)
        call = fused.compiled("mlp", lambda held, x: functional_call(module, held, (x,)))
        with torch.autocast("cuda", torch.bfloat16):
            out = call(dict(module.named_parameters()), x)
        out.sum().backward()
    eager = report.by_part(trace.kernels)["mlp"]
    return {
        "fused": fused.kernels,
        "eager_kernels": eager["kernels"],
        "eager_bytes": eager["bytes"],
        # forward and both gradients
        "product_flop": 3 * 2 * 2 * 512 * 256 * 1024,
    }


def main() -> None:
    start_processes()
    fake_cuda.pretend()
    print(json.dumps(find("tiny", None, 8, "bf16", "autocast", False) | mlp()), flush=True)


if __name__ == "__main__":
    main()
