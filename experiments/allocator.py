"""Let the C library keep the memory that training frees, instead of giving it back and asking for it again.

A training step on a CPU allocates and frees the same large tensors over and over. By default glibc gives every block
above 32 MB back to the system at once, and the next one costs a page fault for every 4 KB: a third of the time of a
small convolutional network (``python -m benchmarks.allocator``). Resident memory stays at its peak in exchange.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMIT = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process.

    Returns:
        Whether that was possible: on Linux with glibc only.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LIMIT))
