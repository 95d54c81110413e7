"""How fast a model reads a prompt and generates, measured as llama.cpp's `llama-bench` measures it.

Random tokens with BOS in front, a warm-up, then repetitions from the same state of the cache: empty, or filled
to a depth before the clock starts. Nothing is sampled, so that the figure is the model's alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.errors import Interrupted, LocalmixError
from localmix.measurement import peak_memory
from localmix.native.devices import Placement, devices
from localmix.native.library import LLAMA_CPP_COMMIT
from localmix.native.model import Context, Model
from localmix.tensor_types import TensorType
from localmix.worker import Channel, Progress, Report, Worker

# llama-bench's defaults
PROMPT, GENERATED, REPETITIONS = 512, 128, 5
# for a column beside others, where the perplexity's own pass has timed the prompt
FEW_REPETITIONS = 3
BATCH, MICRO_BATCH = 2048, 512
# what llama.cpp's tools take for a KV cache
KV_TYPES = ("f16", "q8_0", "q4_0", "bf16", "f32", "q4_1", "q5_0", "q5_1", "iq4_nl")


@dataclass(frozen=True)
class SpeedTest:
    """One run: `prompt` tokens that are read, then `generated` tokens, one after the other; either may be 0."""

    prompt: int
    generated: int

    @property
    def name(self) -> str:
        """As llama-bench names it: `pp512`, `tg128`, `pp512+tg128`."""
        parts = (f"pp{self.prompt}" if self.prompt else "", f"tg{self.generated}" if self.generated else "")
        return "+".join(filter(None, parts))


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    Attributes:
        batch, micro_batch: most tokens of a decode, and of what is computed at once.
        depth: tokens in the cache before a run.
        kv_type: of both halves of the KV cache, one of `KV_TYPES`.
        gpu_layers: None for as many as llama.cpp places there.
    """

    threads: int
    batch: int = BATCH
    micro_batch: int = MICRO_BATCH
    depth: int = 0
    kv_type: str = "f16"
    gpu_layers: int | None = None


@dataclass(frozen=True)
class Machine:
    """What it ran on: the processor's name and those of the GPUs, and the version of the engine."""

    processor: str
    gpus: tuple[str, ...]
    engine: str = f"llama.cpp {LLAMA_CPP_COMMIT}"


@dataclass(frozen=True)
class SpeedPoint:
    """A model's speed in one test with one choice of settings.

    Attributes:
        nanoseconds: of each repetition.
        description: llama.cpp's few words on the model.
        weight_bytes, parameters: of the model.
        memory_bytes: peak of the process that ran it; None where it failed.
        failure: why there are no repetitions.
    """

    path: Path
    test: SpeedTest
    settings: Settings
    nanoseconds: tuple[int, ...] = ()
    description: str = ""
    weight_bytes: int = 0
    parameters: int = 0
    memory_bytes: int | None = None
    machine: Machine = field(default_factory=lambda: Machine("", ()))
    failure: str = ""

    @property
    def name(self) -> str:
        """The test and its depth, as llama-bench names them: `tg128 @ d4096`."""
        return f"{self.test.name} @ d{self.settings.depth}" if self.settings.depth else self.test.name

    @property
    def samples(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        tokens = self.test.prompt + self.test.generated
        return tuple(1e9 * tokens / duration for duration in self.nanoseconds)

    @property
    def tps(self) -> float | None:
        """Tokens per second, the mean of the repetitions."""
        return float(np.mean(self.samples)) if self.samples else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the tokens per second; 0 for one repetition."""
        return float(np.std(self.samples, ddof=1)) if len(self.samples) > 1 else 0.0 if self.samples else None

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds for each token, the mean of the repetitions."""
        tokens = self.test.prompt + self.test.generated
        return float(np.mean(self.nanoseconds)) / 1e6 / tokens if self.nanoseconds else None


def sweep(
    threads: Iterable[int],
    batches: Iterable[int] = (BATCH,),
    micro_batches: Iterable[int] = (MICRO_BATCH,),
    depths: Iterable[int] = (0,),
    kv_types: Iterable[str] = ("f16",),
    gpu_layers: Iterable[int | None] = (None,),
) -> list[Settings]:
    """Every combination, in llama-bench's order: what needs another load of the model changes least."""
    return [
        Settings(threads, batch, micro_batch, depth, kv_type, layers)
        for layers, batch, micro_batch, kv_type, threads, depth in itertools.product(
            gpu_layers, batches, micro_batches, kv_types, threads, depths
        )
    ]


def bench(
    models: Sequence[Path],
    tests: Sequence[SpeedTest],
    settings: Sequence[Settings],
    repetitions: int = REPETITIONS,
    progress: Report | None = None,
    names: tuple[str, ...] = (),
) -> Iterator[SpeedPoint]:
    """Measure each model in each test with each choice of settings; a point comes as soon as it is done.

    Where a model or a choice of settings fails its points say so and the others go on, unless it is the only one.

    Args:
        models: GGUF files.
        progress: (runs done, runs in all, what runs).
        names: of the devices to use; empty for all.

    Raises:
        LocalmixError: the only model failed with the only settings.
    """
    total = len(models) * len(settings) * len(tests) * repetitions
    finished = 0
    for path in models:
        for layers, some in itertools.groupby(settings, key=lambda choice: choice.gpu_layers):
            group = list(some)
            left = [(choice, test) for choice in group for test in tests]
            try:
                with Worker(_bench, path, Placement(layers, devices=names), group, tests, repetitions) as running:
                    for event in running:
                        if isinstance(event, SpeedPoint):
                            left.remove((event.settings, event.test))
                            finished += repetitions
                            yield event
                        elif progress is not None and isinstance(event, Progress):
                            progress(finished + event.done, total, f"{path.stem}: {event.label}")
            except Interrupted:
                raise
            except LocalmixError as error:
                if len(models) == len(settings) == 1:
                    raise
                for choice, test in left:
                    finished += repetitions
                    yield SpeedPoint(path, test, choice, failure=error.message)


def _bench(
    channel: Channel,
    path: Path,
    placement: Placement,
    group: Sequence[Settings],
    tests: Sequence[SpeedTest],
    repetitions: int,
) -> None:
    """The child's part of `bench`: one load of a model."""
    found = devices()
    machine = Machine(
        ", ".join(device.description for device in found if device.kind in ("cpu", "accelerator")),
        tuple(device.description for device in found if device.kind in ("gpu", "integrated gpu")),
    )

    def report(done: int, label: str) -> None:
        channel.progress(done, repetitions, label)

    with Model(path, placement=placement, cancelled=channel.cancelled) as model:
        for settings in group:
            peak_memory.forget_peak()
            left = list(tests)
            try:
                for test, nanoseconds in _time(channel, model, settings, tests, repetitions, report):
                    left.remove(test)
                    channel.emit(
                        SpeedPoint(
                            path=path,
                            test=test,
                            settings=settings,
                            nanoseconds=nanoseconds,
                            description=model.description,
                            weight_bytes=model.weight_bytes,
                            parameters=model.parameters,
                            memory_bytes=peak_memory.peak(),
                            machine=machine,
                        )
                    )
            except Interrupted:
                raise
            except LocalmixError as error:
                if len(group) == 1:
                    raise
                for test in left:
                    channel.emit(SpeedPoint(path, test, settings, machine=machine, failure=error.message))


def _time(
    channel: Channel,
    model: Model,
    settings: Settings,
    tests: Sequence[SpeedTest],
    repetitions: int,
    report: Callable[[int, str], None],
) -> Iterator[tuple[SpeedTest, tuple[int, ...]]]:
    """The nanoseconds of each repetition of each test, in one context.

    Args:
        report: called with the repetitions that are done and the test's name before each run.
    """
    kv_type = TensorType[settings.kv_type.upper()]
    with Context(
        model,
        context_length=settings.depth + max(test.prompt + test.generated for test in tests),
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        threads=settings.threads,
        type_k=kv_type,
        type_v=kv_type,
        # not `cancelled`, which is asked before each node of the graph: that is time of a small model's steps
    ) as context:
        runner = _Runner(channel, context)
        # all of them before the cache is filled, which may take long
        for test in tests:
            report(0, f"{test.name}, warm-up")
            runner.rewind(0)
            runner.run(SpeedTest(test.prompt, min(1, test.generated)), 0)
        filled = False
        for test in tests:
            nanoseconds: list[int] = []
            for number in range(repetitions):
                if not (filled and runner.rewind(settings.depth)):
                    report(number, f"{test.name}, filling {settings.depth} tokens")
                    runner.rewind(0)
                    runner.run(SpeedTest(settings.depth, 0), 0)
                    filled = True
                report(number, test.name)
                start = time.perf_counter_ns()
                runner.run(test, settings.depth)
                nanoseconds.append(time.perf_counter_ns() - start)
            yield test, tuple(nanoseconds)


class _Runner:
    """Runs random tokens through a context."""

    def __init__(self, channel: Channel, context: Context) -> None:
        self._channel = channel
        self._context = context
        self._random = np.random.default_rng(0)

    def rewind(self, depth: int) -> bool:
        """Forget what is behind `depth`; False if this kind of cache cannot."""
        if depth == 0:
            self._context.clear()
            return True
        return self._context.remove(0, depth)

    def run(self, test: SpeedTest, depth: int) -> None:
        """Read and generate from position `depth` on, and wait until it is done.

        Raises:
            Interrupted: the parent wants the run to end; asked between two decodes.
        """
        context = self._context
        # each part has BOS in front, as llama-bench has it
        prompt, generated = self._tokens(test.prompt), self._tokens(test.generated)
        for start in range(0, test.prompt, context.batch):
            self._channel.check()
            part = prompt[start : start + context.batch]
            places = depth + np.arange(start, start + len(part))
            context.decode(part, places, 0, places == places[-1])
        context.synchronize()
        for place, token in enumerate(generated, depth + test.prompt):
            self._channel.check()
            context.decode(token, place, 0, True)
            context.synchronize()

    def _tokens(self, count: int) -> NDArray[np.int64]:
        vocabulary = self._context.model.vocabulary
        tokens = self._random.integers(0, vocabulary.size, count)
        if vocabulary.add_bos:
            tokens[:1] = vocabulary.bos
        return tokens


@dataclass(frozen=True)
class Speed:
    """Speeds of a model, means over the repetitions.

    Attributes:
        prompt: tokens of the prompt, read at `prompt_tps` tokens per second; 0 and None if none was.
        generated: tokens generated after an empty prompt, at `generation_tps` tokens per second.
        ms_per_token: milliseconds for each generated token.
    """

    prompt: int
    prompt_tps: float | None
    generated: int
    generation_tps: float
    ms_per_token: float


def time_model(
    channel: Channel,
    model: Model,
    threads: int,
    prompt: int = 0,
    generated: int = GENERATED,
    repetitions: int = FEW_REPETITIONS,
    kv_type: str = "f16",
) -> Speed:
    """Measure a loaded model; for a job that has it open anyway.

    Args:
        prompt: tokens; 0 to measure the generation only.
    """
    settings = Settings(threads, kv_type=kv_type)
    points: list[SpeedPoint] = []
    tests = [SpeedTest(prompt, 0)] if prompt else []
    tests.append(SpeedTest(0, generated))

    def report(done: int, _: str) -> None:
        channel.progress(len(points) * repetitions + done, len(tests) * repetitions, "runs")

    for test, nanoseconds in _time(channel, model, settings, tests, repetitions, report):
        points.append(SpeedPoint(model.path, test, settings, nanoseconds))
        report(0, "")
    reading, generating = points[0] if prompt else None, points[-1]
    assert generating.tps and generating.ms_per_token
    return Speed(
        prompt=prompt,
        prompt_tps=reading.tps if reading else None,
        generated=generated,
        generation_tps=generating.tps,
        ms_per_token=generating.ms_per_token,
    )
