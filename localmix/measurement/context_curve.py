"""Perplexity of a model against its context.

llama.cpp's way measures each context by itself: chunks of that many tokens, the second half of each scored. Then
every context has other target tokens, and a curve shows their choice too. Paired, the targets are those of the
longest context, at every context: a shorter one reads each of them in a window of its own length, in which it
stands in the second half.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.errors import UsageError
from localmix.measurement.corpus import Corpus
from localmix.measurement.measuring_child import MeasuringChild
from localmix.measurement.perplexity import (
    Conditions,
    Layout,
    Tally,
    cut,
    decode_chunks,
    first_token,
    load,
    perplexity_of,
)
from localmix.native.devices import default_threads
from localmix.presentation.table import Column, ContextPoint, Table
from localmix.worker import Channel, Progress, Report


def measure_contexts(
    model: Path,
    corpus: Corpus,
    contexts: Sequence[int],
    conditions: Conditions,
    paired: bool = False,
    name: str = "",
    kind: str = "",
    progress: Report | None = None,
    child: MeasuringChild | None = None,
) -> Iterator[ContextPoint]:
    """Measure a model at several contexts; a point comes as soon as it is done, the shortest context first.

    Args:
        model: a GGUF file.
        contexts: tokens of a chunk.
        conditions: all but their `ctx` count; `chunks` are those of the longest context when paired.
        paired: score the same target tokens at every context.
        name, kind: of the model and its type, for the points.
        progress: (windows done, in all, the context).
        child: measures; None for one of its own.

    Raises:
        UsageError: a context is too small.
        InputError: the model is broken, or the text too short for the longest context.
        CapacityError: memory does not suffice.
    """
    wanted = sorted(set(contexts))
    with contextlib.ExitStack() as stack:
        child = child or stack.enter_context(MeasuringChild())
        for event in child.events(_measure_here, model, corpus, wanted, conditions, paired, name, kind):
            if isinstance(event, ContextPoint):
                yield event
            elif isinstance(event, Progress) and progress is not None:
                progress(event.done, event.total, event.label)


def _measure_here(
    channel: Channel,
    path: Path,
    corpus: Corpus,
    contexts: list[int],
    conditions: Conditions,
    paired: bool,
    name: str,
    kind: str,
) -> None:
    threads = conditions.threads or default_threads()
    with load(path, conditions, channel) as model:
        longest = cut(model, corpus, replace(conditions, ctx=contexts[-1]))
        for ctx in contexts:
            if paired:
                chunks, seen = windows(longest, ctx, first_token(model))
            else:
                chunks = cut(model, corpus, replace(conditions, ctx=ctx))
                seen = np.zeros(len(chunks), int)
            layout = Layout.for_chunks(ctx, conditions.rope, conditions.kv_type)
            with layout.open(model, threads, channel) as context, Tally(chunks, threads) as tally:
                for part in decode_chunks(context, chunks, layout, tally.first):
                    tally.add(part)
                    part.report(channel, len(chunks), ctx, f"chunks of {ctx}")
            nll = tally.nll[np.arange(tally.nll.shape[1]) >= seen[:, None]]
            ppl, error = perplexity_of(nll)
            channel.emit(ContextPoint(name, kind, ctx, paired, ppl, error, nll.size, len(chunks), corpus.name))


def windows(chunks: NDArray[np.int32], ctx: int, bos: int | None) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Lay windows over the second halves of chunks, so that each target stands in the second half of one.

    The windows of a chunk follow each other by their scored tokens; the last one ends with the chunk, and its
    first targets have been scored by the one before.

    Args:
        chunks: int32 `[chunks, positions]`.
        ctx: tokens of a window, at most those of a chunk.
        bos: token that replaces the first of each window, or None.

    Returns:
        The windows, int32 `[windows, ctx]`, and how many targets of each have been scored before it.

    Raises:
        UsageError: a window has no target.
    """
    size = chunks.shape[1]
    step = ctx - 1 - ctx // 2
    if step < 1:
        raise UsageError(f"A context of {ctx} tokens is too small to measure.")
    # positions whose logits predict the chunk's targets: from its middle to the last but one
    middle, targets = size // 2, size - 1 - size // 2
    wanted = middle - ctx // 2 + step * np.arange(-(-targets // step))
    starts = np.minimum(wanted, size - ctx)
    places = starts[:, None] + np.arange(ctx)
    found = chunks[:, places].reshape(-1, ctx)
    if bos is not None:
        found[:, 0] = bos
    return found, np.tile(wanted - starts, len(chunks))


def curve_table(points: Sequence[ContextPoint], caption: str = "") -> Table:
    """A row for each point; model, type and corpus only where they differ."""
    distinct = {
        "Model": [point.model for point in points],
        "Type": [point.type for point in points],
        "Corpus": [point.corpus for point in points],
    }
    names = {title: column for title, column in distinct.items() if len(set(column)) > 1}
    columns = [Column(title, number=False) for title in names]
    columns += [Column("Context"), Column("PPL"), Column("±"), Column("Tokens", rank=1), Column("Chunks", rank=1)]
    rows = tuple(
        (
            *(column[index] for column in names.values()),
            f"{point.context}",
            f"{point.ppl:.4f}",
            "–" if point.error is None else f"{point.error:.4f}",
            f"{point.tokens:,}" if point.tokens else "–",
            f"{point.chunks:,}" if point.chunks else "–",
        )
        for index, point in enumerate(points)
    )
    records = tuple(
        {
            "model": point.model,
            "type": point.type,
            "origin": point.origin,
            "corpus": point.corpus,
            "paired": "yes" if point.paired else "no",
            "context": point.context,
            "ppl": point.ppl,
            "ppl_error": point.error,
            "tokens": point.tokens or None,
            "chunks": point.chunks or None,
        }
        for point in points
    )
    return Table(tuple(columns), rows, caption, records=records)
