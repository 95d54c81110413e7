"""How fast a model reads a prompt and generates, measured as llama.cpp's `llama-bench` measures it.

Random tokens, an empty cache before each run, one warm-up, then repetitions: nothing is sampled, so that the
figure is the model's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localmix import worker
from localmix.native.devices import default_threads
from localmix.native.model import Context, Model
from localmix.worker import Channel, Report

PROMPT, GENERATED, REPETITIONS = 512, 128, 5


@dataclass(frozen=True)
class Speed:
    """Speeds of a model, mean and standard deviation over the repetitions.

    Attributes:
        prompt: tokens of the prompt, read at `prompt_tps` tokens per second.
        generated: tokens generated after an empty prompt, at `generation_tps` tokens per second.
        ms_per_token: milliseconds for each generated token.
    """

    prompt: int
    prompt_tps: float
    prompt_deviation: float
    generated: int
    generation_tps: float
    generation_deviation: float
    ms_per_token: float
    threads: int
    repetitions: int


def generation_speed(
    model: Path,
    prompt: int = PROMPT,
    generated: int = GENERATED,
    repetitions: int = REPETITIONS,
    threads: int | None = None,
    progress: Report | None = None,
) -> Speed:
    """Measure a model's speed, in a child process.

    Args:
        prompt, generated: tokens of a run.
        threads: None for the machine's fast cores.
        progress: (runs done, runs in all, "runs").

    Raises:
        InputError: the model is broken.
        CapacityError: memory does not suffice.
    """
    return worker.run(_measure, model, prompt, generated, repetitions, threads, progress=progress)


def _measure(channel: Channel, path: Path, prompt: int, generated: int, repetitions: int, threads: int | None) -> Speed:
    with Model(path, cancelled=channel.cancelled) as model:
        return time_model(channel, model, threads or default_threads(), prompt, generated, repetitions)


def time_model(
    channel: Channel,
    model: Model,
    threads: int,
    prompt: int = PROMPT,
    generated: int = GENERATED,
    repetitions: int = REPETITIONS,
) -> Speed:
    """Measure a loaded model."""
    random = np.random.default_rng(0)
    size = model.vocabulary.size
    done = 0

    def runs(run: Callable[[int], None], count: int, warm_up: int) -> list[float]:
        nonlocal done
        context.clear()
        run(warm_up)
        seconds = []
        for _ in range(repetitions):
            context.clear()
            start = time.perf_counter()
            run(count)
            seconds.append(time.perf_counter() - start)
            done += 1
            channel.progress(done, 2 * repetitions, "runs")
        return seconds

    def read(count: int) -> None:
        for start in range(0, count, context.batch):
            places = np.arange(start, min(start + context.batch, count))
            context.decode(random.integers(0, size, len(places)), places, 0, places == places[-1])
        context.synchronize()

    def generate(count: int) -> None:
        for place, token in enumerate(random.integers(0, size, count)):
            context.decode(token, place, 0, True)
            context.synchronize()

    length = max(prompt, generated)
    with Context(model, context_length=length, threads=threads, cancelled=channel.cancelled) as context:
        reading = runs(read, prompt, prompt)
        generating = runs(generate, generated, 1)
    prompt_tps = prompt / np.asarray(reading)
    generation_tps = generated / np.asarray(generating)
    return Speed(
        prompt=prompt,
        prompt_tps=float(prompt_tps.mean()),
        prompt_deviation=float(prompt_tps.std(ddof=1)) if repetitions > 1 else 0.0,
        generated=generated,
        generation_tps=float(generation_tps.mean()),
        generation_deviation=float(generation_tps.std(ddof=1)) if repetitions > 1 else 0.0,
        ms_per_token=1000 * float(np.mean(generating)) / generated,
        threads=threads,
        repetitions=repetitions,
    )
