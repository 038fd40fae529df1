"""Training on a CPU keeps the memory that a step frees, since the next one needs as much (glibc's mallopt).

glibc takes tensors of more than 32 MiB, such as logits, from the system one by one and gives them back when they are
freed, and so it does with what is free at the end of its heap. Each step then waits for the same pages to be mapped and
cleared again.
"""

from __future__ import annotations

import ctypes
import os

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

_SETTINGS = {
    _MMAP_MAX: 0,  # tensors come from the heap, whatever their size,
    _TRIM_THRESHOLD: -1,  # which does not shrink,
    _TOP_PAD: 2**28,  # and grows by this many bytes or more
}


def keep() -> None:
    """Until the process ends. Whoever has set glibc's variables, or has another malloc, is left alone."""
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    own = ctypes.CDLL(None)
    if hasattr(own, "gnu_get_libc_version") and hasattr(own, "mallopt"):
        for name, value in _SETTINGS.items():
            own.mallopt(name, value)
