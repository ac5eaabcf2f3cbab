"""Run by `python -c` on each node: one all-reduce over all ranks, as a job's first one; prints its seconds as JSON."""

import datetime
import json
import os
import sys
import time


def main() -> None:
    import torch
    import torch.distributed as dist

    backend, seconds = os.environ["DOCTOR_BACKEND"], float(os.environ["DOCTOR_SECONDS"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    # the first one also makes the connections
    for _ in range(2):
        numbers = torch.full((1 << 18,), float(rank + 1), device=device)
        started = time.monotonic()
        dist.all_reduce(numbers)
        lowest, highest = numbers.min().item(), numbers.max().item()
        took = time.monotonic() - started
        expected = world_size * (world_size + 1) / 2
        if lowest != expected or highest != expected:
            sys.exit(f"wrong sum: {lowest} to {highest} where {expected} was due")
    dist.destroy_process_group()
    print(json.dumps({"seconds": took}))


if __name__ == "__main__":
    # a traceback ends with the line that says what is wrong, and that line is shown
    main()
