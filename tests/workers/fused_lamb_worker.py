"""Two ranks: LAMB on its kernels, in Triton's interpreter, at every ZeRO stage against timm's on one. Prints JSON of errors."""

from __future__ import annotations

import os
import sys

# Triton decides when it decorates a function, and these processes are forks of one that has it; its C++ has no part in that
os.environ["TRITON_INTERPRET"] = "1"
for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
    del sys.modules[name]

from optim_worker import CASES, STEPS, Net, batches, error, reference, round_trip, start, train, weights  # noqa: E402
from ranks import begin, tell  # noqa: E402

from scalekd_ds.config import OptimConfig  # noqa: E402
from scalekd_ds.kernels.lamb import launch  # noqa: E402
from scalekd_ds.optim import lamb  # noqa: E402


def main() -> None:
    begin()
    lamb.runs_triton = lambda parameters: True
    launches, apply = [], launch.apply
    launch.apply = lambda *arguments: launches.append(apply(*arguments))
    cfg = OptimConfig("lamb", lr=0.02, weight_decay=0.1, eps=1e-6)
    initial, expected = [p.detach().clone() for p in Net().parameters()], reference(cfg, 0.0)
    found = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        launches.clear()
        engine = start(cfg, CASES[stage], 0.0)
        train(engine, batches()[:STEPS])
        found[stage] = {"error": error(weights(engine), expected, initial), "launches": len(launches)}
        engine.destroy()
        found[stage]["checkpoint"] = round_trip(CASES[stage])
    tell(found)


if __name__ == "__main__":
    main()
