"""The most memory that this process held: weights that were read, caches, buffers and the interpreter.

Memory of a GPU is not counted. Linux can forget an earlier peak; elsewhere a peak is that of the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path


def forget_peak() -> bool:
    """Begin again with what is held now; False where the system cannot."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        # glibc keeps what was freed, and it would count as the next model's
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # proc_pid_clear_refs(5): 5 resets the peak
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """Bytes, since the process began or `forget_peak` was called."""
    with contextlib.suppress(OSError):
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
