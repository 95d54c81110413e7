"""How long one weight of each type takes when a token is generated on this machine.

To generate a token every weight that is used is read once and multiplied with a vector. ggml does that here with a
ring of matrices of each type (`native.weight_ring`). The types take turns, round after round, so that a busy minute
hits them all alike, and the quickest product with each matrix counts: other programs can only make it slower, and a
product takes so little time, a millisecond or two, that in some turn each is left alone.

Added up over the weights that a token uses, this is some 7 % less than real generation takes, for dense models and
for experts, with K- and I-quants alike: attention and norms are the rest. bench/type_speed.py measures it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from localmix.errors import LocalmixError, UsageError
from localmix.native.devices import default_threads, devices
from localmix.native.library import LLAMA_CPP_COMMIT, api
from localmix.native.weight_ring import COLUMNS, ROWS, WeightRing
from localmix.output import file_error, write_atomically
from localmix.tensor_types import ENCODABLE, TensorType
from localmix.worker import Channel, Report, run

FORMAT = 1  # of what is kept: raised when it would be measured in another way
RING_BYTES = 96 << 20  # at least; twice the largest cache where that is more
TURNS = 3  # of each ring in a round; the first also brings its pages and its threads
LEAST_ROUNDS, MOST_ROUNDS = 7, 20
STEADY_ROUNDS, STEADY = 3, 0.05  # it ends when so many rounds have made no type quicker by so much
PATIENCE = 60.0  # seconds, after which no further round begins
_FIGURES = "seconds_per_weight"


@dataclass(frozen=True)
class TypeSpeeds:
    """What was measured.

    Attributes:
        seconds: of one weight when nothing disturbed, by type.
        others: share of the processor that other programs used meanwhile; 0 where nothing was measured now.
        busy: they used so much of it that the figures did not settle: some may be far too slow. They are not kept.
        kept: whether all of it was measured before.
    """

    processor: str
    engine: str
    threads: int
    seconds: Mapping[TensorType, float]
    others: float
    busy: bool
    kept: bool


def seconds_per_weight(
    types: Collection[TensorType], threads: int | None = None, progress: Report | None = None
) -> Mapping[TensorType, float]:
    """The time of one weight in a matrix that is multiplied with one vector, in seconds, by type.

    Types that were measured on this processor before are not measured again; the others take about half a second each.

    Args, Raises:
        As `measure`.
    """
    return measure(types, threads, progress=progress).seconds


def measure(
    types: Collection[TensorType],
    threads: int | None = None,
    again: bool = False,
    progress: Report | None = None,
    folder: Path | None = None,
    patience: float = PATIENCE,
) -> TypeSpeeds:
    """Measure what has not been measured with this engine, processor and number of threads, and keep it if possible.

    Args:
        threads: `devices.default_threads` for None.
        again: measure all of it anew.
        progress: (turns done, turns in all, what is measured).
        folder: where it is kept; the user's cache for None.
        patience: seconds, after which no further round begins.

    Raises:
        UsageError: a type is none of weights.
        CapacityError: there is no memory for a ring.
        InputError: llama.cpp cannot be loaded.
    """
    for kind in types:
        if kind not in ENCODABLE:
            raise UsageError(f"{kind.name} is no type of weights.")
    count = threads or default_threads()
    key = _key(count)
    path = (folder or platformdirs.user_cache_path("localmix", appauthor=False) / "type-speeds") / _file_name(key)
    known = _read(path, key)
    wanted = [kind for kind in types if again or kind not in known]
    found = _Measured({}, 0.0, True)
    if wanted:
        found = run(_measure, wanted, count, patience, progress=progress)
        known |= found.seconds
    if found.seconds and found.settled:
        with contextlib.suppress(LocalmixError):  # it is measured again the next time
            _keep(path, key, known)
    return TypeSpeeds(
        processor=key["processor"],
        engine=key["engine"],
        threads=count,
        seconds={kind: known[kind] for kind in types},
        others=found.others,
        busy=not found.settled,
        kept=not wanted,
    )


@dataclass(frozen=True)
class _Measured:
    """Seconds of a weight, the share of the processor that others used, and whether the last rounds changed nothing."""

    seconds: Mapping[TensorType, float]
    others: float
    settled: bool


def _measure(channel: Channel, types: Sequence[TensorType], threads: int, patience: float) -> _Measured:
    """The child's part of `measure`."""
    before = _processor_seconds()
    ring_bytes = max(RING_BYTES, 2 * _largest_cache(Path("/sys/devices/system/cpu/cpu0/cache")))
    quickest: dict[TensorType, NDArray[np.float64]] = {}
    number = steady = 0
    began = time.monotonic()
    while number < MOST_ROUNDS and (number < LEAST_ROUNDS or steady < STEADY_ROUNDS):
        if number > 1 and time.monotonic() - began > patience:
            break
        number += 1
        steady += 1
        for index, kind in enumerate(types, (number - 1) * len(types)):
            channel.check()
            channel.progress(index, max(number, LEAST_ROUNDS) * len(types), f"round {number}, {kind.name}")
            with WeightRing(kind, ring_bytes, threads) as ring:
                seconds = np.min([ring.turn() for _ in range(TURNS)], axis=0)
            if kind not in quickest or seconds.sum() < quickest[kind].sum() * (1 - STEADY):
                steady = 0
            quickest[kind] = np.minimum(seconds, quickest.get(kind, math.inf))
    theirs, everything = (after - first for after, first in zip(_processor_seconds(), before, strict=True))
    others = max(0.0, theirs / everything) if everything > 0 else 0.0
    found = {kind: float(seconds.mean()) / (ROWS * COLUMNS) for kind, seconds in quickest.items()}
    return _Measured(found, others, steady >= STEADY_ROUNDS)


def _largest_cache(folder: Path) -> int:
    """Bytes of a core's largest cache, from Linux's files on them; 0 if there are none."""
    sizes = []
    for file in folder.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=0)


def _processor_seconds() -> tuple[float, float]:
    """Seconds that other programs used of all processors since the system's start, and those that there were."""
    import psutil

    system, own = psutil.cpu_times(), psutil.Process().cpu_times()
    everything = sum(system) - getattr(system, "guest", 0.0) - getattr(system, "guest_nice", 0.0)  # in user and nice
    idle = system.idle + getattr(system, "iowait", 0.0)
    return everything - idle - own.user - own.system, everything


def _key(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "format": FORMAT,
        "engine": f"llama.cpp {LLAMA_CPP_COMMIT}",
        # what the engine was built for: another build of the same version has other kernels
        "features": api().llama_print_system_info().decode("ascii", "replace").strip(" |"),
        "processor": next(device.description for device in devices() if device.kind == "cpu"),
        "threads": threads,
    }


def _file_name(key: Mapping[str, Any]) -> str:
    return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]}.json"


def _read(path: Path, key: Mapping[str, Any]) -> dict[TensorType, float]:
    """What is kept in a file; nothing if it is no file for this key."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        if any(kept[name] != value for name, value in key.items()):
            return {}
        found = {TensorType[name]: float(seconds) for name, seconds in kept[_FIGURES].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {kind: seconds for kind, seconds in found.items() if 0 < seconds < math.inf}


def _keep(path: Path, key: Mapping[str, Any], known: Mapping[TensorType, float]) -> None:
    """Write the figures for this key.

    Raises:
        FileError, CapacityError: as `output.OutputFile`.
    """
    kept = {**key, _FIGURES: {kind.name: known[kind] for kind in sorted(known)}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, path.parent, "write") from error
    write_atomically(path, json.dumps(kept, indent=1).encode("ascii"))
