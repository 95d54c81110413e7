"""Each lane kernel against ggml_quantize_chunk, in million weights per second, as a Markdown table.

    python bench/kernels.py                              # every type, about five minutes
    python bench/kernels.py --types Q4_K,IQ3_S --repeat 9

One core first, every instruction set that runs here, in processor time; then all cores, the widest one, by the
clock. The runs of one row take turns and the best of each counts, so that a slow moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from localmix.native.kernels import quantize_rows
from localmix.native.lanes import instruction_sets, kernel
from localmix.tensor_types import TensorType

COLUMNS = 4096


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best(runs: dict[str, Callable[[], object]], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """The shortest seconds of each run; they take turns."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeat):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def measure(kind: TensorType, rows: np.ndarray, importance: np.ndarray | None, repeat: int) -> list[str]:
    """The cells of one row."""
    names = [name for name in instruction_sets() if kernel(kind, importance is not None, name)]
    here = {name: lambda name=name: quantize_rows(kind, rows, importance, name) for name in ("ggml", *names)}
    # What else runs on the machine takes the clock's time, not this thread's.
    alone = best(here, repeat, time.thread_time)
    parts = np.array_split(rows, 4 * cores())
    with ThreadPoolExecutor(cores()) as pool:
        everywhere = {
            name: lambda name=name: list(pool.map(lambda part: quantize_rows(kind, part, importance, name), parts))
            for name in ("ggml", names[-1])
        }
        together = best(everywhere, repeat, time.perf_counter)

    def cell(seconds: dict[str, float], name: str) -> str:
        if name not in seconds:
            return "–"
        speed = f"{rows.size / seconds[name] / 1e6:.1f}"
        return speed if name == "ggml" else f"{speed} ({seconds['ggml'] / seconds[name]:.1f} ×)"

    return [
        kind.name,
        "no" if importance is None else "yes",
        *(cell(alone, name) for name in ("ggml", *instruction_sets())),
        cell(together, "ggml"),
        cell(together, names[-1]),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="only these, separated by commas")
    parser.add_argument("--rows", type=int, default=256, help=f"rows of {COLUMNS} weights in each run")
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the best counts")
    asked = parser.parse_args()
    wanted = [TensorType[name] for name in asked.types.split(",")] if asked.types else list(TensorType)
    random = np.random.default_rng(5)
    rows = (0.02 * random.standard_normal((asked.rows, COLUMNS))).astype(np.float32)
    importance = (0.1 + random.random(COLUMNS)).astype(np.float32)
    heads = ["type", "imatrix", "ggml", *instruction_sets(), f"ggml, {cores()} cores", f"lanes, {cores()} cores"]
    print(f"{platform.system()} {platform.machine()}, {cores()} cores; million weights per second\n")
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads), flush=True)
    for kind in wanted:
        for given in (None, importance):
            if any(kernel(kind, given is not None, name) for name in instruction_sets()):
                print("| " + " | ".join(measure(kind, rows, given, asked.repeat)) + " |", flush=True)


if __name__ == "__main__":
    main()
