"""Perplexity of a model on a text, as llama.cpp's `llama-perplexity` defines it.

Chunks of a fixed number of tokens that do not overlap, BOS in the place of each chunk's first token, the second
half of each chunk scored: PPL = exp(mean negative log-likelihood). Memory does not grow with the context: the
logits of one micro-batch are reduced before the next is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix import worker
from localmix.corpus import Corpus, read_corpus, split
from localmix.errors import InputError
from localmix.native.devices import default_threads
from localmix.native.model import Context, Model
from localmix.native.tensors import EvalCallback
from localmix.speed import Speed, time_model
from localmix.worker import Channel, Report

# llama-perplexity's defaults: its numbers depend on them in the last digits
BATCH, MICRO_BATCH = 2048, 512
# elements of a block of logits whose exponentials stay in a core's cache while they are summed
BLOCK = 1 << 17


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
        chunk_nll: the mean of each chunk.
        seconds: of computing, without loading.
        prompt_ms_per_token: milliseconds for each token that went through the model here.
        speed: generation speed, if it was asked for.
        notes: sentences on what is unusual.
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
    chunk_nll: tuple[float, ...]
    seconds: float
    prompt_ms_per_token: float
    speed: Speed | None = None
    notes: tuple[str, ...] = ()


def measure(
    model: Path,
    corpus: Path | Corpus,
    ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    speed: bool = False,
    progress: Report | None = None,
) -> Perplexity:
    """Measure a model's perplexity, in a child process.

    Args:
        model: a GGUF file.
        corpus: a UTF-8 text, or the path of one.
        ctx: tokens of a chunk.
        chunks: how many at most; None for all.
        threads: None for the machine's fast cores.
        speed: measure the generation speed too, while the model is loaded.
        progress: (chunks done, chunks in all, "chunks").

    Raises:
        InputError: a file is broken or too short, or a chunk gives no finite number.
        CapacityError: memory does not suffice.
    """
    text = corpus if isinstance(corpus, Corpus) else read_corpus([corpus])
    return worker.run(measure_here, model, text, ctx, chunks, threads, speed, progress=progress)


def measure_here(
    channel: Channel,
    path: Path,
    corpus: Corpus,
    ctx: int,
    limit: int | None,
    threads: int | None,
    with_speed: bool,
) -> Perplexity:
    """The child's part of `measure`."""
    threads = threads or default_threads()
    with Model(path, cancelled=channel.cancelled) as model:
        vocabulary = model.vocabulary
        chunks = split(
            model.tokenize(corpus.text),
            ctx,
            name=corpus.name,
            limit=limit,
            bos=vocabulary.bos if vocabulary.add_bos else None,
        )
        layout = Layout.for_chunks(ctx)
        tally = Tally(chunks, threads)
        channel.progress(0, len(chunks), "chunks")
        start = time.perf_counter()
        with layout.open(model, threads, channel) as context, tally:
            for part in decode_chunks(context, chunks, layout, logits_from=ctx // 2):
                tally.add(part)
                if part.start + part.length == ctx:
                    channel.progress(part.first_chunk + part.sequences, len(chunks), "chunks")
        seconds = time.perf_counter() - start
        speed = time_model(channel, model, threads) if with_speed else None
        trained = model.trained_context
    notes = corpus.notes
    if ctx > trained:
        notes += (f"{path.name} was trained with {trained} tokens of context, and is measured with {ctx}.",)
    return Perplexity(
        model=path.name,
        corpus=corpus.name,
        sha256=tuple(file.sha256 for file in corpus.files),
        context=ctx,
        chunks=len(chunks),
        tokens=tally.tokens,
        ppl=tally.perplexity,
        error=tally.error,
        nll=tally.mean,
        chunk_nll=tuple(tally.chunk_means),
        seconds=seconds,
        prompt_ms_per_token=1000 * seconds / chunks.size,
        speed=speed,
        notes=notes,
    )


@dataclass(frozen=True)
class Layout:
    """How chunks share a context, chosen as llama.cpp's tools choose it.

    Attributes:
        context: tokens of a chunk.
        parallel: chunks that are computed side by side, each in a sequence of its own.
    """

    context: int
    parallel: int

    @classmethod
    def for_chunks(cls, context: int) -> Layout:
        """The layout for chunks of this many tokens."""
        return cls(context, max(1, BATCH // context))

    def open(self, model: Model, threads: int, channel: Channel, callback: EvalCallback | None = None) -> Context:
        """A context for it."""
        return Context(
            model,
            context_length=self.parallel * self.context,
            batch=MICRO_BATCH,
            micro_batch=MICRO_BATCH,
            sequences=self.parallel,
            threads=threads,
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


def decode_chunks(context: Context, chunks: NDArray[np.int32], layout: Layout, logits_from: int) -> Iterator[Part]:
    """Run chunks through a model, micro-batch by micro-batch.

    llama.cpp cuts a batch of several sequences into micro-batches of an equal stretch of each. The same cuts
    are made here, so that the numbers are the same, but each piece is a decode of its own: only its logits
    are in memory.

    Args:
        chunks: int32 `[chunks, positions]`.
        logits_from: first position of each chunk whose logits are wanted.
    """
    size = chunks.shape[1]
    for first in range(0, len(chunks), layout.parallel):
        group = chunks[first : first + layout.parallel]
        context.clear()
        step = max(1, MICRO_BATCH // len(group))
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
    """Collects the negative log-likelihoods of the scored tokens: those of the second half of each chunk.

    Args:
        chunks: int32 `[chunks, positions]`.
        threads: for the softmax.
    """

    def __init__(self, chunks: NDArray[np.int32], threads: int) -> None:
        self._chunks = chunks
        self._first = chunks.shape[1] // 2
        self._sums = np.zeros(len(chunks))
        self._squares = np.zeros(len(chunks))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, part: Part) -> None:
        """Score a part; its logits at position p predict the token at p + 1.

        Raises:
            InputError: a chunk's likelihood is not finite.
        """
        size = self._chunks.shape[1]
        start = max(part.scored, self._first)
        end = min(part.start + part.length, size - 1)
        if start >= end:
            return
        rows = slice(part.first_chunk, part.first_chunk + part.sequences)
        targets = self._chunks[rows, start + 1 : end + 1]
        logits = part.logits[:, start - part.scored : end - part.scored]
        jobs = []
        for sequence in range(part.sequences):
            for span in np.array_split(np.arange(end - start), self._threads):
                if len(span):
                    where = slice(span[0], span[-1] + 1)
                    jobs.append((logits[sequence, where], targets[sequence, where]))
        found = self._pool.map(negative_log_likelihoods, *zip(*jobs, strict=True))
        values = np.concatenate(list(found)).reshape(part.sequences, -1)
        if not np.isfinite(values).all():
            sequence, place = np.argwhere(~np.isfinite(values))[0]
            raise InputError(
                f"Chunk {part.first_chunk + sequence + 1} gives no finite probability at token"
                f" {start + place + 1}: the model's weights or its computation are broken.",
                "Measure another type of it, or convert it again: `localmix convert` names weights that are NaN.",
            )
        self._sums[rows] += values.sum(1)
        self._squares[rows] += (values * values).sum(1)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return len(self._chunks) * int(self._chunks.shape[1] - 1 - self._first)

    @property
    def chunk_means(self) -> list[float]:
        """Mean negative log-likelihood of each chunk."""
        means: list[float] = (self._sums / (self._chunks.shape[1] - 1 - self._first)).tolist()
        return means

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood."""
        return float(self._sums.sum() / self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite where that is beyond a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the mean, times the perplexity."""
        variance = float(self._squares.sum() / self.tokens) - self.mean**2
        return math.sqrt(max(0.0, variance) / max(1, self.tokens - 1)) * self.perplexity


def negative_log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row: float32 exponentials, float64 sums, as llama.cpp computes it.

    Args:
        logits: float32 `[rows, vocabulary]`.
        targets: int32 `[rows]`.

    Returns:
        float64 `[rows]`.
    """
    count, vocabulary = logits.shape
    rows = max(1, BLOCK // vocabulary)
    exponentials = np.empty((min(rows, count), vocabulary), np.float32)
    result = np.empty(count)
    for start in range(0, count, rows):
        block = logits[start : start + rows]
        space = exponentials[: len(block)]
        largest = block.max(axis=1)
        np.subtract(block, largest[:, None], out=space)
        np.exp(space, out=space)
        chosen = block[np.arange(len(block)), targets[start : start + rows]]
        sums = space.sum(axis=1, dtype=np.float64)
        result[start : start + rows] = np.log(sums) + (largest.astype(np.float64) - chosen)
    return result
