"""How long one weight of each type takes when a token is generated on this machine.

To generate a token every weight that is used is read once and multiplied with a vector. ggml does that here with a
ring of matrices of each type (`native.weight_ring`). The types take turns, round after round, so that a busy minute
hits them all alike, and the quickest turn of each counts: other programs can only make it slower.

Added up over the weights that a token uses, this was 2 to 6 % less than real generation took, for dense models and
for experts, with K- and I-quants: attention and norms are the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from localmix.errors import UsageError
from localmix.native.devices import default_threads, devices
from localmix.native.library import LLAMA_CPP_COMMIT, api
from localmix.native.weight_ring import WeightRing
from localmix.output import file_error, write_atomically
from localmix.tensor_types import ENCODABLE, TensorType
from localmix.worker import Channel, Report, run

FORMAT = 1  # of what is kept: raised when it would be measured in another way
RING_BYTES = 96 << 20
ROUNDS = 7
TURNS = 3  # of each ring in a round; the first also brings its pages and its threads
_FIGURES = "seconds_per_weight"  # [quickest, median] by type
BUSY = 1.3  # a usual turn takes so many times the quickest, when other programs use the processor


@dataclass(frozen=True)
class TypeSpeeds:
    """What was measured.

    Attributes:
        seconds: of one weight in the quickest turn, by type.
        usual: of one weight in the median of the turns.
        kept: whether all of it was measured before.
    """

    processor: str
    engine: str
    threads: int
    seconds: Mapping[TensorType, float]
    usual: Mapping[TensorType, float]
    kept: bool

    @property
    def busy(self) -> bool:
        """Whether other programs slowed most of it down, so that even the quickest turns may be slow."""
        return statistics.median(self.usual[kind] / self.seconds[kind] for kind in self.seconds) > BUSY


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
) -> TypeSpeeds:
    """Measure what has not been measured with this engine, processor and number of threads, and keep it.

    Args:
        threads: `devices.default_threads` for None.
        again: measure all of it anew.
        progress: (turns done, turns in all, what is measured).
        folder: where it is kept; the user's cache for None.

    Raises:
        UsageError: a type is none of weights.
        CapacityError: there is no memory for a ring.
        InputError: llama.cpp cannot be loaded.
        FileError: it cannot be kept.
    """
    for kind in types:
        if kind not in ENCODABLE:
            raise UsageError(f"{kind.name} is no type of weights.")
    count = threads or default_threads()
    key = _key(count)
    path = (folder or platformdirs.user_cache_path("localmix", appauthor=False) / "type-speeds") / _file_name(key)
    known = _read(path, key)
    wanted = [kind for kind in types if again or kind not in known]
    if wanted:
        known |= run(_measure, wanted, count, progress=progress)
        _keep(path, key, known)
    return TypeSpeeds(
        processor=key["processor"],
        engine=key["engine"],
        threads=count,
        seconds={kind: known[kind][0] for kind in types},
        usual={kind: known[kind][1] for kind in types},
        kept=not wanted,
    )


def _measure(channel: Channel, types: Sequence[TensorType], threads: int) -> dict[TensorType, tuple[float, float]]:
    """The child's part of `measure`: seconds of a weight in the quickest turn and in the median one."""
    turns: dict[TensorType, list[float]] = {kind: [] for kind in types}
    for number in range(ROUNDS):
        for index, kind in enumerate(types):
            channel.check()
            channel.progress(number * len(types) + index, ROUNDS * len(types), f"round {number + 1}: {kind.name}")
            with WeightRing(kind, RING_BYTES, threads) as ring:
                turns[kind] += [ring.turn() / ring.weights for _ in range(TURNS)]
    return {kind: (min(seconds), statistics.median(seconds)) for kind, seconds in turns.items()}


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


def _read(path: Path, key: Mapping[str, Any]) -> dict[TensorType, tuple[float, float]]:
    """What is kept in a file; nothing if it is no file for this key."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        if any(kept[name] != value for name, value in key.items()):
            return {}
        found = {TensorType[name]: (float(best), float(usual)) for name, (best, usual) in kept[_FIGURES].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {kind: (best, usual) for kind, (best, usual) in found.items() if 0 < best <= usual < math.inf}


def _keep(path: Path, key: Mapping[str, Any], known: Mapping[TensorType, tuple[float, float]]) -> None:
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
