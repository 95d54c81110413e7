"""Collect an importance matrix: how strongly a calibration text drives each input column of each weight.

The same sums and counts as llama.cpp's `llama-imatrix`, collected in process: the eval callback sees the input
of every product with a weight. Perplexity comes with it, because every token asks for its logits (or the last
layer's experts would see only part of the text).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix import worker
from localmix.corpus import Corpus, read_corpus, split
from localmix.errors import InputError
from localmix.importance import Entry, Importance, write_importance
from localmix.native.devices import default_threads
from localmix.native.model import Model
from localmix.native.tensors import EvalCallback, Tensor, operations, read, weight_name
from localmix.perplexity import Layout, Tally, decode_chunks
from localmix.tensor_types import TensorType
from localmix.worker import Channel, Report

# llama-imatrix leaves out products of fewer rows, which are not about the text
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Coverage:
    """How many tokens of the calibration text each expert saw.

    Attributes:
        tokens: by layer, one count for each expert; empty for a model without experts.
    """

    tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def least(self) -> tuple[int, int, int] | None:
        """Layer, expert and tokens of the one that saw the fewest; None without experts."""
        seen = [(count, layer, expert) for layer, counts in self.tokens.items() for expert, count in enumerate(counts)]
        if not seen:
            return None
        count, layer, expert = min(seen)
        return layer, expert, count

    @property
    def unreached(self) -> tuple[tuple[int, int], ...]:
        """Layer and expert of those that saw nothing: all their columns will count the same."""
        return tuple(
            (layer, expert)
            for layer, counts in self.tokens.items()
            for expert, count in enumerate(counts)
            if count == 0
        )


@dataclass(frozen=True)
class ImatrixResult:
    """A collected importance matrix.

    Attributes:
        path: the file.
        datasets: names of the corpus files.
        chunks, tokens: how many went through the model.
        perplexity, error: of the model on the calibration text.
        entries: number of weights covered.
        notes: sentences on what is unusual.
    """

    path: Path
    datasets: tuple[str, ...]
    chunks: int
    tokens: int
    perplexity: float
    error: float
    entries: int
    coverage: Coverage
    notes: tuple[str, ...] = ()


def collect(
    model: Path,
    corpora: Sequence[Path],
    output: Path,
    ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Report | None = None,
) -> ImatrixResult:
    """Run a calibration text through a model, and write its importance matrix; the model runs in a child.

    Args:
        model: a GGUF file, best of the full precision.
        corpora: UTF-8 texts.
        output: the GGUF file to write; it appears whole or not at all.
        ctx: tokens of a chunk.
        chunks: how many at most; None for all.
        threads: None for the machine's fast cores.
        progress: (chunks done, chunks in all, "chunks").

    Raises:
        InputError: a file is broken or too short, or the model computes what is not finite.
        CapacityError: memory does not suffice.
        FileError: the output cannot be written.
    """
    corpus = read_corpus(corpora)
    found = worker.run(_collect, model, corpus, ctx, chunks, threads, progress=progress)
    datasets = tuple(file.name for file in corpus.files)
    entries = found.entries
    write_importance(output, Importance(entries, datasets, found.chunks, ctx, output))
    coverage = _coverage(entries)
    notes = corpus.notes
    if coverage.unreached:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in coverage.unreached[:8])
        more = len(coverage.unreached) - 8
        notes += (
            f"No token reached {named}{f' and {more} more' if more > 0 else ''}: a longer or more varied text would.",
        )
    return ImatrixResult(
        path=output,
        datasets=datasets,
        chunks=found.chunks,
        tokens=found.chunks * ctx,
        perplexity=found.perplexity,
        error=found.error,
        entries=len(entries),
        coverage=coverage,
        notes=notes,
    )


@dataclass(frozen=True)
class _Found:
    """What the child sends back."""

    entries: dict[str, Entry]
    chunks: int
    perplexity: float
    error: float


def _collect(channel: Channel, path: Path, corpus: Corpus, ctx: int, limit: int | None, threads: int | None) -> _Found:
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
        collector = Collector()
        callback = EvalCallback(collector.wanted, collector.computed)
        tally = Tally(chunks, threads)
        channel.progress(0, len(chunks), "chunks")
        with layout.open(model, threads, channel, callback) as context, tally:
            for part in decode_chunks(context, chunks, layout, logits_from=0):
                tally.add(part)
                if part.start + part.length == ctx:
                    channel.progress(part.first_chunk + part.sequences, len(chunks), "chunks")
        return _Found(collector.entries(), len(chunks), tally.perplexity, tally.error)


class Collector:
    """Sums the squares of what goes into each weight: the two functions of an `EvalCallback`.

    Sums of a batch are float32, their total over the batches float64.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._operations = operations()
        # Neighbours share their input (q, k and v; gate and up), so its sums are kept for the next weight.
        self._last: tuple[int, int] | None = None
        self._last_names: set[str] = set()
        self._last_sums: NDArray[np.float32] = np.empty(0, np.float32)
        self._last_counts: NDArray[np.int64] = np.empty(0, np.int64)

    def wanted(self, tensor: Tensor) -> bool:
        """Whether a node is a product with a weight of a block, on enough rows."""
        if tensor.op == self._operations.mul_mat_id:
            return True
        if tensor.op != self._operations.mul_mat:
            return False
        activations = tensor.src[1].contents
        if activations.ne[1] < FEWEST_ROWS or activations.type != TensorType.F32:
            return False
        return weight_name(tensor.src[0].contents).startswith("blk.")

    def computed(self, tensor: Tensor) -> None:
        """Add the input of a product to its weight's sums.

        Raises:
            InputError: it is not finite.
        """
        weight, activations = tensor.src[0].contents, tensor.src[1]
        name = weight_name(weight)
        routed = tensor.op == self._operations.mul_mat_id
        source = (_address(activations), _address(tensor.src[2]) if routed else 0)
        # a weight that comes again belongs to the next batch, whose tensors may lie at the same addresses
        if source != self._last or name in self._last_names:
            if routed:
                self._route(activations.contents, tensor.src[2].contents, int(weight.ne[2]))
            else:
                self._flatten(activations.contents, int(weight.ne[2]), int(weight.ne[3]))
            if not np.isfinite(self._last_sums).all():
                raise InputError(
                    f"The input of {name} is not finite: the model's weights or its computation are broken."
                )
            self._last = source
            self._last_names = set()
        self._last_names.add(name)
        if name in self._sums:
            self._sums[name] += self._last_sums
            self._counts[name] += self._last_counts
        else:
            self._sums[name] = self._last_sums.astype(np.float64)
            self._counts[name] = self._last_counts.copy()

    def entries(self) -> dict[str, Entry]:
        """What was collected, for each weight's name."""
        return {
            name: Entry(self._sums[name].astype(np.float32), self._counts[name].astype(np.float32))
            for name in sorted(self._sums)
        }

    def _flatten(self, activations: Tensor, matrices: int, more_matrices: int) -> None:
        """A plain product: every row counts, for each matrix of a stacked weight its own."""
        values = read(activations, np.float32)
        columns = values.shape[-1]
        if matrices * more_matrices == 1:
            rows = values.reshape(-1, columns)
            self._last_sums = np.einsum("ij,ij->j", rows, rows)[None]
        else:
            # rows [i3, i2] go to matrix [i3 % ne3, i2 % ne2]
            sums = np.einsum("abij,abij->abj", values, values)
            shape = (-1, more_matrices, sums.shape[1] // matrices, matrices, columns)
            self._last_sums = sums.reshape(shape).sum((0, 2)).reshape(-1, columns)
        rows_each = int(np.prod(values.shape[:-1])) // (matrices * more_matrices)
        self._last_counts = np.full(1, rows_each, np.int64)

    def _route(self, activations: Tensor, chosen: Tensor, experts: int) -> None:
        """A product with stacked experts: each row goes to the expert that `chosen` names."""
        ids = read(chosen, np.int32)[0, 0]  # [tokens, used]
        values = read(activations, np.float32)[0]  # [tokens, used or 1, columns]
        selected = ids[:, :, None] == np.arange(experts, dtype=np.int32)  # [tokens, used, experts]
        self._last_counts = selected.sum((0, 1), dtype=np.int64)
        shared = values.shape[1]
        # where all used experts read the same row, that row is squared and summed once for all of them
        weights = selected.reshape(len(ids), -1, shared, experts).sum(1).astype(np.float32)
        squares = np.square(values).reshape(-1, values.shape[-1])
        self._last_sums = weights.reshape(-1, experts).T @ squares


def _address(pointer: object) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _coverage(entries: Mapping[str, Entry]) -> Coverage:
    """Tokens of each layer's experts; all stacked weights of a layer see the same ones."""
    tokens: dict[int, tuple[int, ...]] = {}
    for name, entry in entries.items():
        match = re.match(r"blk\.(\d+)\..*_exps\.weight$", name)
        if match and len(entry.counts) > 1:
            tokens[int(match[1])] = tuple(int(count) for count in entry.counts)
    return Coverage(dict(sorted(tokens.items())))
