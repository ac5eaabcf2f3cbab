"""Run on every rank by the DeepSpeed launcher: meets the others and prints one line of JSON about the meeting."""

import argparse
import json
import os
import socket

import deepspeed
import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.parse_args()
    deepspeed.init_distributed("gloo", verbose=False)
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    met = {"rank": dist.get_rank(), "world": dist.get_world_size(), "host": socket.gethostname(), "sum": total.item()}
    # one write: the ranks' lines arrive through one pipe and must not be mixed
    os.write(1, f"hello {json.dumps(met)}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
