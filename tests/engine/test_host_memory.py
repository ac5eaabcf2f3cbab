"""Freed blocks are handed out again without the kernel clearing their pages anew."""

import platform

import pytest
from forking import forked


# in a process of its own: where an allocation has failed before, glibc gives the thread another arena, of small heaps
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_keep_their_pages():
    done = forked("tests/workers/freed_memory.py")
    assert done.returncode == 0, done.stderr
    # 64 MB in pages of 4 KB are 16384 faults a round where the block is mapped anew
    assert int(done.stdout) < 2000
