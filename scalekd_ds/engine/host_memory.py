"""The C library's allocator, told to keep what a training step frees for the next step."""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Makes glibc hand large blocks out again instead of returning them to the kernel; False where it is not glibc.

    A step on CPU frees and asks for the same gigabytes again. By default each block over 32 MB is a mapping of its own,
    whose every page the kernel clears anew: measured 24 ms against 4 ms for casting one 3x3x2048x2048 weight, and 20% of a
    whole step, for 8% more resident memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
