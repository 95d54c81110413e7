"""Becomes another program that ends with its parent. Linux only; elsewhere llama-server itself sees its parent go.

Run as a script, `python -I launcher.py PARENT PROGRAM [ARGUMENT…]`, so that nothing of Python's runs between fork and
exec in a program with threads: it may only be standard library.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def become(parent: int, command: list[str]) -> None:
    """Replace this process by a command, which the kernel kills when the parent's thread that made it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel knew
        return
    # no core file of a process that maps a whole model, and the first to go when memory ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("500")
    except OSError:  # a container may forbid it
        pass
    os.execv(command[0], command)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
