"""Memory of CPU training, step by step."""

import ctypes
import sys
from functools import cache


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 2**25


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed activations for the next step, instead of giving it back to the system.

    Networks that learn together hold all their graphs at once; by default these hundreds of MiB are unmapped after
    each step, and every page is faulted in again at the next, 3 to 9 % of a ResNet-20 pair's step. Returns whether
    the allocator took the settings (elsewhere than on Linux with glibc there is nothing to set).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
