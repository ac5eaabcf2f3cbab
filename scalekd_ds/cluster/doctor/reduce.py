"""Program that the agent runs by `python -c`, once for each rank: one all-reduce over all ranks; prints its seconds as JSON."""

import datetime
import json
import os
import sys
import time


def main() -> None:
    import torch
    import torch.distributed as dist

    backend, timeout = os.environ["DOCTOR_BACKEND"], float(os.environ["DOCTOR_SECONDS"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    # twice, since the first one also makes the connections
    for _ in range(2):
        numbers = torch.full((1 << 18,), float(rank + 1), device=device)
        started = time.monotonic()
        dist.all_reduce(numbers)
        lowest, highest = numbers.min().item(), numbers.max().item()
        seconds = time.monotonic() - started
        expected = world_size * (world_size + 1) / 2
        if lowest != expected or highest != expected:
            sys.exit(f"wrong sum: {lowest} to {highest} where {expected} was due")
    dist.destroy_process_group()
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    # an exception needs no handling: the agent reports the last line of the traceback
    main()
