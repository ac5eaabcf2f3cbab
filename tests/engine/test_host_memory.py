"""Freed blocks are handed out again without the kernel clearing their pages anew."""

import platform
import resource

import pytest
import torch

from scalekd_ds.engine.host_memory import keep_freed_memory


def page_faults_of(rounds: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_keep_their_pages():
    assert keep_freed_memory()
    # the heap grows to its working size first
    page_faults_of(10)
    # 64 MB in pages of 4 KB are 16384 faults a round where the block is mapped anew
    assert page_faults_of(4) < 2000
