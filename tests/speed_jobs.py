"""Jobs for a worker that measure, and count what reached llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localmix.measurement import speed
from localmix.measurement.speed import Settings, Speed, SpeedTest
from localmix.native.devices import Placement
from localmix.native.library import api
from localmix.native.model import Context, Model
from localmix.worker import Channel


def count_work(
    channel: Channel, path: Path, runs: Sequence[tuple[SpeedTest, Settings]], repetitions: int
) -> list[tuple[int, int, int]]:
    """llama.cpp's own counters of each context: tokens in batches, tokens alone, graphs used again."""
    counts: list[tuple[int, int, int]] = []

    class CountingContext(Context):
        def close(self) -> None:
            if self._handle:
                work = api().llama_perf_context(self.handle)
                counts.append((work.n_p_eval, work.n_eval, work.n_reused))
            super().close()

    speed.Context = CountingContext  # type: ignore[attr-defined]
    for test, settings in runs:
        speed._bench(channel, path, Placement(settings.gpu_layers), [settings], [test], repetitions)
    return counts


def time_opened(channel: Channel, path: Path, prompt: int, generated: int, repetitions: int) -> Speed:
    """`speed.time_model` with one thread."""
    with Model(path) as model:
        return speed.time_model(channel, model, 1, prompt, generated, repetitions)
