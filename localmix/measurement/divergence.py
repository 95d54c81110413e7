"""How far a model's predictions are from those of a reference: the Kullback-Leibler divergence, token by token.

    with_reference = open_reference(Path("f16.gguf"), corpus, Conditions(ctx=512), Cache.of_user())
    with_reference.measure(Path("q4.gguf")).divergence

The reference is measured once and its logits are kept (`localmix.measurement.reference`); without a cache both
models run side by side in one process, and nothing is stored.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmix import worker
from localmix.errors import CapacityError, FileError, InputError
from localmix.measurement import peak_memory
from localmix.measurement.corpus import Corpus, read_corpus
from localmix.measurement.perplexity import (
    Conditions,
    Layout,
    Part,
    Perplexity,
    ReferenceRows,
    Scores,
    Stopwatch,
    Tally,
    cut,
    decode_chunks,
    describe,
    load,
    measure_here,
    score,
    time_generation,
)
from localmix.measurement.reference import Cache, Recorder, Shape, StoredReference
from localmix.measurement.speed import Speed
from localmix.native.devices import default_threads
from localmix.native.model import Model
from localmix.worker import Channel, Report

# `worker.run`, or that of a child that lasts
Run = Callable[..., Any]


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a model from its reference, in nats per scored token.

    Attributes:
        mean, error: the mean over the tokens, and its standard error.
        median, percentile_99, maximum: of the tokens' values.
        same_top: share of the tokens, 0 to 1, for which both hold the same one likeliest.
        same_top_error: standard error of that share.
    """

    mean: float
    error: float
    median: float
    percentile_99: float
    maximum: float
    same_top: float
    same_top_error: float

    @classmethod
    def of(cls, values: NDArray[np.float64], same_top: NDArray[np.bool_]) -> Divergence:
        """The statistics of all tokens' values, as `llama-perplexity --kl-divergence` computes them."""
        root = math.sqrt(max(1, values.size - 1))
        share = float(same_top.mean())
        return cls(
            mean=float(values.mean()),
            error=float(values.std()) / root,
            median=float(np.median(values)),
            percentile_99=float(np.percentile(values, 99)),
            maximum=float(values.max()),
            same_top=share,
            same_top_error=math.sqrt(share * (1 - share)) / root,
        )


@dataclass(frozen=True)
class Reference:
    """A reference over a corpus; `open_reference` makes one.

    Attributes:
        path: its file.
        stored: its logits; None if it runs beside each model.
        perplexity: its own; None if it has not run yet, then `measure` gives it.
        notes: sentences on how it is kept.
    """

    path: Path
    corpus: Corpus
    conditions: Conditions
    stored: Path | None
    perplexity: Perplexity | None
    notes: tuple[str, ...] = ()

    def measure(self, model: Path, speed: bool = False, progress: Report | None = None) -> Perplexity:
        """Measure a model against it, in a child process.

        One that splits the text into other tokens has its perplexity, no divergence, and a note.

        Args:
            model: a GGUF file.
            speed: measure the generation speed too.
            progress: (chunks done, chunks in all, "chunks").

        Raises:
            InputError: the model is broken.
            BrokenReference: the reference gives a number that is not finite.
            CapacityError: memory does not suffice.
        """
        return self.measure_both(model, speed, progress)[0]

    def measure_both(
        self,
        model: Path,
        speed: bool = False,
        progress: Report | None = None,
        conditions: Conditions | None = None,
        run: Run = worker.run,
    ) -> tuple[Perplexity, Perplexity | None]:
        """As `measure`, and the reference's own perplexity; None if it has not run.

        Args:
            conditions: of the model, where it is placed otherwise than the reference.
            run: who runs the job.
        """
        found: Perplexity
        beside: Perplexity | None
        found, beside = run(_measure_here, model, self, conditions or self.conditions, speed, progress=progress)
        return found, self.perplexity or beside


def open_reference(
    path: Path,
    corpus: Corpus,
    conditions: Conditions,
    cache: Cache | None = None,
    speed: bool = False,
    progress: Report | None = None,
    run: Run = worker.run,
) -> Reference:
    """Make a reference ready: from the cache, or measured now and kept there for the next time.

    Without a cache, or where the logits do not fit into it, nothing runs yet.

    Args:
        path: a GGUF file.
        cache: where to keep its logits.
        speed: measure its generation speed too, if it runs now or is in the cache.
        progress: (done, in all, what is counted).
        run: who runs the job.

    Raises:
        InputError: the reference is broken, or a chunk gives no finite number.
        CapacityError: memory does not suffice.
        FileError: the reference cannot be read.
    """
    if cache is None:
        return Reference(path, corpus, conditions, None, None)
    stored = cache.path_for(_files(path), corpus, conditions, progress)
    found = None
    with contextlib.suppress(FileError, InputError):  # none yet, or damaged: it is made again
        found = _look_up(stored, path, corpus, conditions)
    if found is not None:
        if speed:
            timed: Speed = run(_time_here, path, conditions, progress=progress)
            assert timed.prompt_tps
            found = replace(found, speed=timed, prompt_ms_per_token=1000 / timed.prompt_tps)
        return Reference(path, corpus, conditions, stored, found)
    recorded: Perplexity | str
    recorded = run(_record_here, path, corpus, conditions, speed, cache, stored, progress=progress)
    if isinstance(recorded, str):
        return Reference(path, corpus, conditions, None, None, (f"{recorded} It runs beside each model instead.",))
    return Reference(path, corpus, conditions, stored, recorded)


def measure_divergence(
    reference: Path,
    models: Sequence[Path],
    corpus: Path | Corpus,
    ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    cache: Cache | None = None,
    progress: Report | None = None,
) -> list[Perplexity]:
    """Measure models against a reference.

    Args:
        reference, models: GGUF files.
        corpus: a UTF-8 text, or the path of one.
        ctx, chunks, threads: see `perplexity.Conditions`.
        cache: keep the reference's logits there; None to run it beside each model.
        progress: (done, in all, what is counted), for one model after the other.

    Raises:
        LocalmixError: see `open_reference` and `Reference.measure`.
    """
    text = corpus if isinstance(corpus, Corpus) else read_corpus([corpus])
    opened = open_reference(reference, text, Conditions(ctx, chunks, threads), cache, progress=progress)
    return [opened.measure(model, progress=progress) for model in models]


def _files(path: Path) -> Sequence[Path]:
    """All parts of a split file."""
    from localmix.sources.open import open_source

    with open_source(path) as source:
        return source.files()


def _look_up(stored: Path, path: Path, corpus: Corpus, conditions: Conditions) -> Perplexity:
    """The perplexity of a reference that is in the cache, which counts as a use of it."""
    with StoredReference(stored) as file:
        with contextlib.suppress(OSError):
            os.utime(stored)
        return describe(
            path,
            corpus,
            conditions,
            Scores(file.nll, memory=file.memory_bytes),
            trained=file.trained_context,
            threads=conditions.threads or default_threads(),
        )


def _time_here(channel: Channel, path: Path, conditions: Conditions) -> Speed:
    with load(path, conditions, channel) as model:
        return time_generation(channel, model, conditions.threads or default_threads(), conditions, with_prompt=True)


def _record_here(
    channel: Channel,
    path: Path,
    corpus: Corpus,
    conditions: Conditions,
    with_speed: bool,
    cache: Cache,
    stored: Path,
) -> Perplexity | str:
    """Measure the reference and keep its logits; why not, if they cannot be kept."""
    threads = conditions.threads or default_threads()
    with load(path, conditions, channel) as model, contextlib.ExitStack() as stack:
        chunks = cut(model, corpus, conditions)
        shape = Shape.of(chunks, model.vocabulary.size)
        try:
            cache.make_room(shape.bytes)
            recorder = stack.enter_context(Recorder(stored, shape))
        except (CapacityError, FileError) as error:
            return error.message
        scores = score(model, chunks, conditions, threads, channel, recorder.add)
        recorder.finish(scores.nll, model.trained_context, peak_memory.peak())
        return describe(
            path,
            corpus,
            conditions,
            scores,
            trained=model.trained_context,
            threads=threads,
            speed=time_generation(channel, model, threads, conditions) if with_speed else None,
        )


class _Stored:
    """Logits of a reference out of the cache."""

    def __init__(self, file: StoredReference, first: int) -> None:
        self._file = file
        self._first = first

    def rows(self, part: Part) -> ReferenceRows:
        """Those beside a part of the model's."""
        return lambda sequence, start, end: self._file.rows(
            part.first_chunk + sequence, start - self._first, end - self._first
        )


class _Beside:
    """Logits of a reference that runs in step with the model: each has its own, until it goes on."""

    def __init__(self, parts: Iterator[Part]) -> None:
        self._parts = parts

    def rows(self, part: Part) -> ReferenceRows:
        """Those beside a part of the model's."""
        other = next(self._parts)
        return lambda sequence, start, end: other.logits[sequence, start - other.scored : end - other.scored]


class _OtherTokensError(Exception):
    """The model splits the text otherwise than the reference, or has a vocabulary of another size."""


def _measure_here(
    channel: Channel, path: Path, reference: Reference, conditions: Conditions, with_speed: bool
) -> tuple[Perplexity, Perplexity | None]:
    """The child's part of `Reference.measure_both`."""
    try:
        return _measure_paired(channel, path, reference, conditions, with_speed)
    except _OtherTokensError:
        alone = measure_here(channel, path, reference.corpus, conditions, with_speed)
        note = (
            f"{path.name} and {reference.path.name} do not have the same tokens: their predictions cannot be"
            " compared. A reference is the same model in higher precision."
        )
        return replace(alone, notes=(*alone.notes, note)), None


def _measure_paired(
    channel: Channel, path: Path, reference: Reference, conditions: Conditions, with_speed: bool
) -> tuple[Perplexity, Perplexity]:
    corpus = reference.corpus
    threads = conditions.threads or default_threads()
    layout = Layout.for_chunks(conditions.ctx, conditions.rope, conditions.kv_type)
    with load(path, conditions, channel) as model, contextlib.ExitStack() as stack:
        chunks = cut(model, corpus, conditions)
        logits: _Stored | _Beside
        other: Model | None = None
        shape = Shape.of(chunks, model.vocabulary.size)
        if reference.stored is not None:
            file = stack.enter_context(StoredReference(reference.stored))
            same, trained = file.shape == shape, file.trained_context
        else:
            other = stack.enter_context(load(reference.path, reference.conditions, channel))
            same = Shape.of(cut(other, corpus, conditions), other.vocabulary.size) == shape
            trained = other.trained_context
        if not same:
            raise _OtherTokensError
        tally = Tally(chunks, threads, paired=True)
        if other is None:
            logits = _Stored(file, tally.first)
        else:
            other_context = stack.enter_context(layout.open(other, threads, channel))
            logits = _Beside(decode_chunks(other_context, chunks, layout, tally.first))
        stopwatch = Stopwatch()
        began = time.perf_counter()
        # the tally ends first: its threads read what the contexts own
        with layout.open(model, threads, channel) as context, tally:
            for part in stopwatch.over(decode_chunks(context, chunks, layout, tally.first)):
                tally.add(part, logits.rows(part))
                part.report(channel, len(chunks), conditions.ctx)
        seconds = time.perf_counter() - began
        if other is None:
            file.check(tally.reference_nll)
        memory = peak_memory.peak() if other is None else None
        found = describe(
            path,
            corpus,
            conditions,
            Scores(tally.nll, seconds, stopwatch.seconds, memory),
            trained=model.trained_context,
            threads=threads,
            speed=time_generation(channel, model, threads, conditions) if with_speed else None,
        )
        timed = other if with_speed and reference.perplexity is None else None
        beside = describe(
            reference.path,
            corpus,
            conditions,
            Scores(tally.reference_nll),
            trained=trained,
            threads=threads,
            speed=time_generation(channel, timed, threads, reference.conditions) if timed else None,
        )
        return _against(found, beside, tally), beside


def _against(found: Perplexity, reference: Perplexity, tally: Tally) -> Perplexity:
    """A model's perplexity with what the reference says about it; the errors are those of paired tokens."""
    differences = found.ppl * tally.nll - reference.ppl * tally.reference_nll
    return replace(
        found,
        reference=reference.model,
        delta_ppl=found.ppl - reference.ppl,
        delta_error=float(differences.std()) / math.sqrt(max(1, differences.size - 1)),
        divergence=Divergence.of(tally.divergence, tally.same_top),
        token_divergence=tally.divergence.ravel(),
    )
