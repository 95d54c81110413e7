"""The most memory that this process held: weights that were read, caches, buffers and the interpreter.

Memory of a GPU is not counted. Linux can forget an earlier peak; elsewhere a peak is that of the whole process.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path


def forget_peak() -> None:
    """Begin again with what is held now, where the system can."""
    with contextlib.suppress(OSError):
        # proc_pid_clear_refs(5): 5 resets the peak
        Path("/proc/self/clear_refs").write_text("5")


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
