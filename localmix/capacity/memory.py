"""Memory before anything is loaded: what a model's need consists of, what this machine has, and the two verdicts.

What is anonymous (KV cache, buffers, weights reordered for the processor) must fit,
or the system kills the process: then the model *loads*. Weights that are mapped from the file can be dropped and
read again, so too many of them are slow: only when everything fits does the model *run well*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import psutil

from localmix.errors import UsageError
from localmix.sizes import GIB
from localmix.sources.base import Source

# positions to run and to measure with where nothing else is asked for
DEFAULT_CONTEXT = 4096

# A machine sold with 16 GB reports 15.3 to 15.8 GiB, the rest is the firmware's and the graphics'; the
# system itself takes about one more.
FLOOR_GB = 16
REPORTED_SHARE = 15.3 / 16
SYSTEM_BYTES = 1 * GIB


class Verdict(Enum):
    """Whether a model and a machine go together."""

    RUNS_WELL = "runs well"  # everything stays in memory
    LOADS = "loads"  # weights are read from the disk again and again
    NO = "no"  # what cannot be dropped does not fit


@dataclass(frozen=True)
class Need:
    """Bytes that running a model takes of the processor's memory.

    Attributes:
        weights: all of them; mapped from the file, where they are not `repacked`.
        repacked: those of the weights that are copied in another order, into anonymous memory.
        kv: the KV cache of the whole context.
        compute: buffers of the widest step of the graph, and llama.cpp's bookkeeping.
        output: logits.
        vocabulary: the tokens and their look-up tables.
        program: both processes, with their libraries.
    """

    weights: int
    repacked: int
    kv: int
    compute: int
    output: int
    vocabulary: int
    program: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute + self.output + self.vocabulary + self.program

    @property
    def anonymous(self) -> int:
        """What the system cannot drop and read again."""
        return self.total - self.weights + self.repacked

    @property
    def mapped(self) -> Need:
        """The same without reordered weights: slower, and all weights can be dropped."""
        return replace(self, repacked=0)


@dataclass(frozen=True)
class Available:
    """Bytes that can be taken without swapping, and what limits them, for a sentence."""

    bytes: int
    limit: str

    def fits(self, need: Need) -> bool:
        """Whether everything stays in memory."""
        return need.total <= self.bytes

    def verdict(self, need: Need) -> Verdict:
        """Whether the model runs well, or loads at least, its weights left in the order of the file if need be."""
        if self.fits(need):
            return Verdict.RUNS_WELL
        return Verdict.LOADS if need.mapped.anonymous <= self.bytes else Verdict.NO


def trained_context(source: Source) -> int:
    """Positions the model was trained for; 4096 when it does not say."""
    return source.number("{arch}.context_length") or DEFAULT_CONTEXT


def available() -> Available:
    """What this process can take now: free and reclaimable memory, or what its cgroups leave. Swap never counts."""
    memory = psutil.virtual_memory()
    found = Available(memory.available, f"what is free of this machine's {memory.total / GIB:.1f} GiB")
    for headroom, name in _cgroup_headroom():
        if headroom < found.bytes:
            found = Available(headroom, name)
    return found


def is_below_floor() -> bool:
    """Whether this machine has less memory than one that is sold with `FLOOR_GB`."""
    return psutil.virtual_memory().total < FLOOR_GB * REPORTED_SHARE * GIB


def machine(gigabytes: float) -> Available:
    """What a machine sold with so much memory has for a model."""
    usable = int(gigabytes * REPORTED_SHARE * GIB - SYSTEM_BYTES)
    return Available(max(0, usable), f"a machine with {gigabytes:g} GB")


def parse_gigabytes(text: str) -> float:
    """`16`, `16G`, `16GB` or `12.5 GiB` as a number.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is no size of memory.", "Write gigabytes, such as 16 or 32GB.")
    return float(match[1])


def _cgroup_headroom(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, str]]:
    """(bytes, name) of every memory limit on the way from this process's cgroup to the root, v1 and v2.

    Headroom is limit − (used − file cache): the cache is given back when it is needed.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        mounts: tuple[Path, ...]
        if controllers == "":
            mounts, files = (root, root / "unified"), ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mounts, files = (root / "memory",), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for mount in mounts:
            # In a container the mount begins at our own group and the path does not exist below it.
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                measured = _headroom(folder, *files)
                if measured is not None:
                    headroom, limit = measured
                    group = "/" + "/".join(parts[:depth])
                    found.append((headroom, f"the {limit / GIB:.2f} GiB limit of cgroup {group}"))
    return found


def _headroom(folder: Path, limit_file: str, usage_file: str, prefix: str) -> tuple[int, int] | None:
    try:
        limit = int((folder / limit_file).read_text())  # "max" is no number
        used = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit >= 2**60:  # v1's way of saying that there is none
        return None
    cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, limit - max(0, used - cache)), limit
