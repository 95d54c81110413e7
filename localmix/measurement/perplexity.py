"""Perplexity of a model on a text, as llama.cpp's `llama-perplexity` defines it.

Chunks of a fixed number of tokens that do not overlap, BOS in the place of each chunk's first token, the second
half of each chunk scored: PPL = exp(mean negative log-likelihood). Memory does not grow with the context: the
logits of one micro-batch are reduced before the next is computed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localmix import worker
from localmix.errors import InputError
from localmix.measurement import peak_memory
from localmix.measurement.corpus import Corpus, read_corpus, split
from localmix.measurement.likelihood import BLOCK, Likelihoods, likelihoods
from localmix.native.devices import ANYWHERE, Placement, default_threads
from localmix.native.library import LLAMA_CPP_COMMIT
from localmix.native.model import Context, Model
from localmix.native.tensors import EvalCallback
from localmix.rope_scaling import RopeScaling
from localmix.tensor_types import TensorType
from localmix.worker import Channel, Report

if TYPE_CHECKING:
    from localmix.measurement.divergence import Divergence
    from localmix.measurement.speed import Speed

# llama-perplexity's defaults: its numbers depend on them in the last digits
BATCH, MICRO_BATCH = 2048, 512
# llama.cpp gives each sequence no fewer, so that more of them side by side would only take memory
LEAST_CELLS = 256
ENGINE = f"llama.cpp {LLAMA_CPP_COMMIT}"

# Rows of the reference for one chunk of a part: (number of the chunk in the part, first position, end).
ReferenceRows = Callable[[int, int, int], NDArray[np.float32]]


class BrokenReference(InputError):
    """It is the reference that gives no finite number, not the model."""


@dataclass(frozen=True)
class Conditions:
    """What two measurements share if their numbers compare.

    Attributes:
        ctx: tokens of a chunk.
        chunks: how many at most; None for all.
        threads: None for the machine's fast cores; changes the speed only.
        rope: how positions are stretched.
        placement: what lies on a GPU.
        repack: whether weights may be copied in the processor's own order; see `native.model.Model`.
        kv_type: of the KV cache: `f16`, `q8_0` or `q4_0`.
    """

    ctx: int = 512
    chunks: int | None = None
    threads: int | None = None
    rope: RopeScaling | None = None
    placement: Placement = ANYWHERE
    kv_type: str = "f16"
    repack: bool = True


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a corpus.

    Attributes:
        model: file name of the model.
        corpus: name of the corpus, with `sha256` of each of its files.
        context: tokens of a chunk.
        chunks: how many were measured.
        tokens: how many were scored.
        ppl: exp of the mean negative log-likelihood.
        error: standard error of `ppl`.
        nll: mean negative log-likelihood, in nats per token.
        threads: of the processor.
        seconds: of computing, without loading.
        prompt_ms_per_token: milliseconds for each token that went through the model here; None if none did.
        engine: name and commit of what computed it.
        memory_bytes: peak of the process that measured, mapped weights included; None where it held another
            model too.
        reference: file name of what `delta_ppl`, with the `delta_error` of the paired differences, and
            `divergence` are taken against; empty for none.
        speed: generation speed, if it was asked for.
        notes: sentences on what is unusual.
        token_nll: float64, negative log-likelihood of each scored token in the order of the text.
        token_divergence: float64, Kullback-Leibler divergence from the reference at each of them; empty without one.
    """

    model: str
    corpus: str
    sha256: tuple[str, ...]
    context: int
    chunks: int
    tokens: int
    ppl: float
    error: float
    nll: float
    threads: int
    seconds: float
    prompt_ms_per_token: float | None
    engine: str = ENGINE
    memory_bytes: int | None = None
    reference: str = ""
    delta_ppl: float | None = None
    delta_error: float | None = None
    divergence: Divergence | None = None
    speed: Speed | None = None
    notes: tuple[str, ...] = ()
    token_nll: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    token_divergence: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


def measure(
    model: Path,
    corpus: Path | Corpus,
    ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    speed: bool = False,
    progress: Report | None = None,
    rope: RopeScaling | None = None,
    placement: Placement = ANYWHERE,
    kv_type: str = "f16",
) -> Perplexity:
    """Measure a model's perplexity, in a child process.

    Args:
        model: a GGUF file.
        corpus: a UTF-8 text, or the path of one.
        ctx, chunks, threads, rope, placement, kv_type: see `Conditions`.
        speed: measure the generation speed too, while the model is loaded.
        progress: (chunks done, chunks in all, "chunks").

    Raises:
        InputError: a file is broken or too short, or a chunk gives no finite number.
        CapacityError: memory does not suffice.
    """
    text = corpus if isinstance(corpus, Corpus) else read_corpus([corpus])
    conditions = Conditions(ctx, chunks, threads, rope, placement, kv_type)
    return worker.run(measure_here, model, text, conditions, speed, progress=progress)


def measure_here(channel: Channel, path: Path, corpus: Corpus, conditions: Conditions, with_speed: bool) -> Perplexity:
    """The child's part of `measure`."""
    threads = conditions.threads or default_threads()
    with load(path, conditions, channel) as model:
        scores = score(model, cut(model, corpus, conditions), conditions, threads, channel)
        return describe(
            path,
            corpus,
            conditions,
            scores,
            trained=model.trained_context,
            threads=threads,
            speed=time_generation(channel, model, threads, conditions) if with_speed else None,
        )


@dataclass(frozen=True)
class Scores:
    """What a finished pass found, and took if the model ran for it alone.

    Attributes:
        nll: float64 `[chunks, scored]`, negative log-likelihood of each token.
        seconds: of all of it.
        decoding_seconds: of the model alone; None if it did not run.
        memory: peak of the process, in bytes; None where it held another model too.
    """

    nll: NDArray[np.float64]
    seconds: float = 0.0
    decoding_seconds: float | None = None
    memory: int | None = None


def score(
    model: Model,
    chunks: NDArray[np.int32],
    conditions: Conditions,
    threads: int,
    channel: Channel,
    listener: Callable[[Part, Tally], None] | None = None,
) -> Scores:
    """Run chunks, int32 `[chunks, positions]`, through a model and score the second half of each.

    Args:
        listener: sees each part, with its logits, once it is scored.
    """
    layout = Layout.for_chunks(conditions.ctx, conditions.rope, conditions.kv_type)
    stopwatch = Stopwatch()
    began = time.perf_counter()
    with layout.open(model, threads, channel) as context, Tally(chunks, threads) as tally:
        for part in stopwatch.over(decode_chunks(context, chunks, layout, tally.first)):
            tally.add(part)
            if listener is not None:
                listener(part, tally)
            part.report(channel, len(chunks), conditions.ctx)
    return Scores(tally.nll, time.perf_counter() - began, stopwatch.seconds, peak_memory.peak())


def load(path: Path, conditions: Conditions, channel: Channel) -> Model:
    """The model, placed as the conditions say."""
    return Model(path, placement=conditions.placement, repack=conditions.repack, cancelled=channel.cancelled)


def cut(model: Model, corpus: Corpus, conditions: Conditions) -> NDArray[np.int32]:
    """The chunks of a corpus in a model's tokens: int32 `[chunks, positions]`.

    Raises:
        UsageError, InputError: as `corpus.split`.
    """
    return split(
        model.tokenize(corpus.text),
        conditions.ctx,
        name=corpus.name,
        limit=conditions.chunks,
        bos=first_token(model),
    )


def first_token(model: Model) -> int | None:
    """The token that every chunk begins with, or None for its own."""
    return model.vocabulary.bos if model.vocabulary.add_bos else None


def time_generation(
    channel: Channel, model: Model, threads: int, conditions: Conditions, with_prompt: bool = False
) -> Speed:
    """The speed of a loaded model.

    Args:
        with_prompt: of reading too, for a model whose perplexity was not measured now.
    """
    from localmix.measurement.speed import PROMPT, time_model  # most measurements do without

    return time_model(channel, model, threads, PROMPT if with_prompt else 0, kv_type=conditions.kv_type)


def describe(
    path: Path,
    corpus: Corpus,
    conditions: Conditions,
    scores: Scores,
    *,
    trained: int,
    threads: int,
    speed: Speed | None = None,
) -> Perplexity:
    """What is told about a finished pass.

    Args:
        trained: tokens of context that the model was trained with.
    """
    nll, decoding = scores.nll, scores.decoding_seconds
    notes = corpus.notes
    if conditions.ctx > trained:
        notes += (f"{path.name} was trained with {trained} tokens of context, and is measured with {conditions.ctx}.",)
    ppl, error = perplexity_of(nll)
    return Perplexity(
        model=path.name,
        corpus=corpus.name,
        sha256=tuple(file.sha256 for file in corpus.files),
        context=conditions.ctx,
        chunks=len(nll),
        tokens=nll.size,
        ppl=ppl,
        error=error,
        nll=float(nll.mean()),
        threads=threads,
        seconds=scores.seconds,
        prompt_ms_per_token=None if decoding is None else 1000 * decoding / (len(nll) * conditions.ctx),
        memory_bytes=scores.memory,
        speed=speed,
        notes=notes,
        token_nll=nll.ravel(),
    )


def perplexity_of(nll: NDArray[np.float64]) -> tuple[float, float]:
    """The exponential of the mean, infinite where that is beyond a float, and its standard error."""
    mean = float(nll.mean())
    ppl = math.exp(mean) if mean < 700 else math.inf
    return ppl, float(nll.std()) / math.sqrt(max(1, nll.size - 1)) * ppl


class Stopwatch:
    """Adds up the time that an iterable takes to give its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The same items."""
        iterator = iter(parts)
        while True:
            began = time.perf_counter()
            part = next(iterator, None)
            self.seconds += time.perf_counter() - began
            if part is None:
                return
            yield part


@dataclass(frozen=True)
class Layout:
    """How chunks share a context, chosen as llama.cpp's tools choose it from `LEAST_CELLS` tokens on.

    Attributes:
        context: tokens of a chunk.
        parallel: chunks that are computed side by side, each in a sequence of its own.
        rope, kv_type: see `Conditions`.
    """

    context: int
    parallel: int
    rope: RopeScaling | None = None
    kv_type: str = "f16"

    @classmethod
    def for_chunks(cls, context: int, rope: RopeScaling | None = None, kv_type: str = "f16") -> Layout:
        """The layout for chunks of this many tokens."""
        return cls(context, max(1, BATCH // max(context, LEAST_CELLS)), rope, kv_type)

    @property
    def cells(self) -> int:
        """Positions of the KV cache."""
        return self.parallel * max(self.context, LEAST_CELLS)

    def open(self, model: Model, threads: int, channel: Channel, callback: EvalCallback | None = None) -> Context:
        """A context for it."""
        cache = TensorType[self.kv_type.upper()]
        return Context(
            model,
            context_length=self.parallel * self.context,
            batch=MICRO_BATCH,
            micro_batch=MICRO_BATCH,
            sequences=self.parallel,
            threads=threads,
            type_k=cache,
            type_v=cache,
            rope=self.rope,
            callback=callback,
            cancelled=channel.cancelled,
        )


@dataclass(frozen=True)
class Part:
    """Logits of the same stretch of several chunks.

    Attributes:
        first_chunk: index of the first of them; the others follow it.
        sequences: how many chunks.
        start, length: the stretch of positions that was computed.
        scored: first position that has logits; at or behind the stretch's end if none has.
        logits: float32 `[sequences, positions from `scored` on, vocabulary]`, valid until the next part.
    """

    first_chunk: int
    sequences: int
    start: int
    length: int
    scored: int
    logits: NDArray[np.float32]

    def report(self, channel: Channel, total: int, ctx: int, label: str = "chunks") -> None:
        """Tell how many chunks are done, where this part ends some."""
        if self.first_chunk == 0 and self.start == 0:
            channel.progress(0, total, label)
        if self.start + self.length == ctx:
            channel.progress(self.first_chunk + self.sequences, total, label)


def decode_chunks(context: Context, chunks: NDArray[np.int32], layout: Layout, logits_from: int) -> Iterator[Part]:
    """Run chunks through a model, micro-batch by micro-batch.

    llama.cpp cuts a batch of several sequences into micro-batches of an equal stretch of each. The same cuts
    are made here, so that the numbers are the same, but each piece is a decode of its own: only its logits
    are in memory. Where llama.cpp computes more chunks side by side than `Layout` does, the stretches stay its own.

    Args:
        chunks: int32 `[chunks, positions]`.
        logits_from: first position of each chunk whose logits are wanted.
    """
    size = chunks.shape[1]
    side_by_side = max(1, BATCH // size)
    for first in range(0, len(chunks), layout.parallel):
        group = chunks[first : first + layout.parallel]
        context.clear()
        step = max(1, MICRO_BATCH // min(side_by_side, len(chunks) - first // side_by_side * side_by_side))
        sequences = np.arange(len(group))
        for start in range(0, size, step):
            positions = np.arange(start, min(start + step, size))
            wanted = positions >= logits_from
            context.decode(
                group[:, positions].ravel(),
                np.tile(positions, len(group)),
                np.repeat(sequences, len(positions)),
                np.tile(wanted, len(group)),
            )
            scored = max(start, logits_from)
            shape = (len(group), int(wanted.sum()), context.model.vocabulary.size)
            logits = context.logits().reshape(shape) if wanted.any() else np.empty(shape, np.float32)
            yield Part(first, len(group), start, len(positions), scored, logits)


class Tally:
    """Collects what the scored tokens say: those of the second half of each chunk.

    Args:
        chunks: int32 `[chunks, positions]`.
        threads: for the softmax.
        paired: a reference's logits will be given too.

    Attributes:
        first: the first position whose logits are scored: they predict the token behind it.
        nll: float64 `[chunks, scored]`, negative log-likelihood of each token.
        reference_nll, divergence, same_top: of the same shape when paired, else empty; see `Likelihoods`.
    """

    def __init__(self, chunks: NDArray[np.int32], threads: int, paired: bool = False) -> None:
        self._chunks = chunks
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.first = chunks.shape[1] // 2
        shape = (len(chunks), chunks.shape[1] - 1 - self.first)
        self.nll = np.zeros(shape)
        self.reference_nll = np.zeros(shape if paired else (0, 0))
        self.divergence = np.zeros(shape if paired else (0, 0))
        self.same_top = np.zeros(shape if paired else (0, 0), np.bool_)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def span(self, part: Part) -> tuple[int, int]:
        """First and end of the positions of a part that are scored; equal where none is."""
        start = max(part.scored, self.first)
        return start, max(start, min(part.start + part.length, self._chunks.shape[1] - 1))

    def add(self, part: Part, reference: ReferenceRows | None = None) -> None:
        """Score a part; its logits at position p predict the token at p + 1.

        Raises:
            InputError: a number of a chunk is not finite; BrokenReference if it is the reference's.
        """
        start, end = self.span(part)
        if start == end:
            return
        edges = np.linspace(start, end, self._threads + 1).astype(int).tolist()
        jobs = [
            self._pool.submit(self._score, part, sequence, low, high, reference)
            for sequence in range(part.sequences)
            for low, high in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()
        for values, what in (
            (self.reference_nll, "the reference gives no finite probability"),
            (self.nll, "the model gives no finite probability"),
            (self.divergence, "the model gives no finite divergence"),
        ):
            if values.size:
                self._check(part, start, end, values, what)

    def _score(self, part: Part, sequence: int, start: int, end: int, reference: ReferenceRows | None) -> None:
        """Score a stretch of one chunk, in pieces whose reference is still in the cache when it is used."""
        chunk = part.first_chunk + sequence
        step = max(1, 4 * BLOCK // part.logits.shape[2])
        for low in range(start, end, step):
            high = min(low + step, end)
            found = likelihoods(
                part.logits[sequence, low - part.scored : high - part.scored],
                self._chunks[chunk, low + 1 : high + 1],
                reference(sequence, low, high) if reference else None,
            )
            self._keep(found, chunk, slice(low - self.first, high - self.first))

    def _keep(self, found: Likelihoods, chunk: int, places: slice) -> None:
        self.nll[chunk, places] = found.nll
        if self.divergence.size:
            self.reference_nll[chunk, places] = found.reference_nll
            self.divergence[chunk, places] = found.divergence
            self.same_top[chunk, places] = found.same_top

    def _check(self, part: Part, start: int, end: int, values: NDArray[np.float64], what: str) -> None:
        rows = slice(part.first_chunk, part.first_chunk + part.sequences)
        broken = ~np.isfinite(values[rows, start - self.first : end - self.first])
        if broken.any():
            sequence, place = np.argwhere(broken)[0]
            kind = BrokenReference if values is self.reference_nll else InputError
            raise kind(
                f"In chunk {part.first_chunk + sequence + 1} {what} at token {start + place + 1}:"
                " its weights or its computation are broken.",
                "Measure another type of it, or convert it again: `localmix convert` names weights that are NaN.",
            )

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite where that is beyond a float."""
        return perplexity_of(self.nll)[0]

    @property
    def error(self) -> float:
        """Standard error of the mean, times the perplexity."""
        return perplexity_of(self.nll)[1]
