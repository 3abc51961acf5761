"""Keeps memory that training frees: every step takes and frees the same activations."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h. The threshold is the least size that gets a mapping of its own, which `free` returns to the
# system; glibc allows at most 32 MiB. The maxima turn such mappings off, and give all threads the heap that is kept.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_USUAL = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
_ANY_SIZE = ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1))


def keep_freed_memory(*, of_any_size: bool = False) -> bool:
    """Ask glibc not to return freed memory to the system until the process ends.

    A step of cnn1m or resnet20 on a CPU otherwise faults 1,800 pages in again, 5 % of its time. The peak stays as it
    is, but for a few MB. It holds for the whole process, and does nothing where malloc is not glibc's.

    Args:
        of_any_size: Whether memory above 32 MiB, and that of threads other than the first, is kept too. A round of
            `fedq server` with a model of 45 MB takes and frees ten buffers of that size, and faulting them in is two
            thirds of its arithmetic; training gains nothing by it, and its peak may grow by a twentieth.

    Returns:
        Whether glibc has accepted all that it was asked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    settings = _USUAL + (_ANY_SIZE if of_any_size else ())
    results = [mallopt(name, value) for name, value in settings]  # every one is asked, whatever the first says
    return results == [1] * len(settings)
