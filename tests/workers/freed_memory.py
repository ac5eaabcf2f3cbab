"""Prints how many pages the kernel clears for four rounds of taking and freeing 64 MB, once freed memory is kept."""

import resource

import torch

from scalekd_ds.engine.host_memory import keep_freed_memory


def page_faults_of(rounds: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if __name__ == "__main__":
    assert keep_freed_memory()
    # the heap grows to its working size first
    page_faults_of(10)
    print(page_faults_of(4))
