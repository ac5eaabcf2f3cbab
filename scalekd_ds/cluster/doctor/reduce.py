"""Program that the agent runs by `python -c`, once for each rank: an all-reduce over all ranks; prints its seconds as JSON.

On GPUs it makes one over gloo first, whose connections a job needs beside those of NCCL.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from typing import Any

# what the program does at the moment, for the line of one that hangs
part = ["the meeting of the ranks"]


def give_up(seconds: float) -> None:
    """Ends this process, inside of a library that hangs."""
    print(f"{part[0]} is not done within {seconds:.0f} s", flush=True)
    os._exit(1)


def reduce(dist: Any, numbers: Any, world_size: int, group: Any = None) -> float:
    """Seconds of an all-reduce of 1 MiB; the first one also makes the connections."""
    started = time.monotonic()
    dist.all_reduce(numbers, group=group)
    lowest, highest = numbers.min().item(), numbers.max().item()
    seconds = time.monotonic() - started
    expected = world_size * (world_size + 1) / 2
    if lowest != expected or highest != expected:
        sys.exit(f"{part[0]}: wrong sum: {lowest} to {highest} where {expected} was due")
    return seconds


def main() -> None:
    """Meets the other ranks, reduces, and prints a line of JSON with the seconds."""
    import torch
    import torch.distributed as dist

    backend, timeout = os.environ["DOCTOR_BACKEND"], float(os.environ["DOCTOR_SECONDS"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # counted from here, where a node that reads torch for the first time has done so
    limit = threading.Timer(timeout, give_up, (timeout,))
    limit.daemon = True
    limit.start()
    # the limit above says more than a time-out of theirs
    later = datetime.timedelta(seconds=2 * timeout)
    dist.init_process_group("gloo", timeout=later)
    part[0] = "the all-reduce over gloo"
    for _ in range(2):
        seconds = reduce(dist, torch.full((1 << 18,), float(rank + 1)), world_size)
    if backend == "nccl":
        part[0] = "the all-reduce over NCCL"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=later)
        for _ in range(2):
            seconds = reduce(dist, torch.full((1 << 18,), float(rank + 1), device=device), world_size, group)
    part[0] = "the end of the ranks"
    dist.destroy_process_group()
    print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    # an exception needs no handling: the agent reports the last line of the traceback
    main()
