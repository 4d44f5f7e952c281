"""Peak memory of a process."""

from __future__ import annotations

import sys


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far; the present one where the system does not record the peak."""
    import psutil

    memory = psutil.Process().memory_info()
    try:
        import resource
    except ImportError:  # not a POSIX system
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
