"""The most memory that this process has held; needs nothing installed."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Most bytes that were resident so far: Linux's VmHWM; elsewhere what getrusage tells.

    On Linux getrusage would begin with what the process was forked from.
    """
    if _STATUS.is_file():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
