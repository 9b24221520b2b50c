"""What is asked of Linux's C library that Python has no call for; elsewhere nothing happens."""

import ctypes
import sys
from functools import cache

BEGIN = 2  # SYNC_FILE_RANGE_WRITE


@cache
def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None)
    if hasattr(found, "sync_file_range"):
        found.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


def keep_freed_memory() -> None:
    """Asks glibc not to hand freed megabytes back to the kernel, which would clear their pages anew for each region."""
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 29)
        libc.mallopt(mmap_threshold, 1 << 25)


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Has the disk begin with these bytes of a file, so that it works while more are computed and fsync waits less.

    A wish, that says nothing of success: fsync does.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "sync_file_range"):
        libc.sync_file_range(descriptor, start, count, BEGIN)
