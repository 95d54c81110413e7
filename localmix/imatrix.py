"""Collect an importance matrix: how strongly a calibration text drives each input column of each weight.

The same sums and counts as llama.cpp's `llama-imatrix`, collected in process: the eval callback sees the input
of every product with a weight. Perplexity comes with it, because every token asks for its logits (or the last
layer's experts would see only part of the text).

A long run saves what it has every minute beside the output, as `OUTPUT.partial`; `resume` goes on from there,
or from a finished matrix of fewer chunks, and ends with the same bits as a run in one go.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.errors import InputError
from localmix.gguf_format import read_header
from localmix.importance import (
    Coverage,
    Entry,
    Importance,
    encode_importance,
    load_importance,
    merge_importance,
    write_importance,
)
from localmix.measurement.corpus import Corpus, read_corpus, split
from localmix.measurement.perplexity import BATCH, Layout, Tally, decode_chunks
from localmix.native.devices import default_threads
from localmix.native.model import Model
from localmix.native.tensors import EvalCallback, Tensor, operations, read, weight_name
from localmix.output import OutputFile
from localmix.tensor_types import TensorType
from localmix.worker import Channel, Progress, Report, Worker

# llama-imatrix leaves out products of fewer rows, which are not about the text
FEWEST_ROWS = 16
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class ImatrixResult:
    """A collected importance matrix.

    Attributes:
        path: the file.
        datasets: names of the corpus files.
        chunks, tokens: how many it has seen, earlier runs that it goes on from included.
        perplexity, error: of the model on the chunks of this run; None when nothing was left to do.
        entries: number of weights covered.
        notes: sentences on what is unusual.
    """

    path: Path
    datasets: tuple[str, ...]
    chunks: int
    tokens: int
    perplexity: float | None
    error: float | None
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
    *,
    resume: Path | None = None,
    output_weight: bool = False,
    save_seconds: float = SAVE_SECONDS,
) -> ImatrixResult:
    """Run a calibration text through a model, and write its importance matrix; the model runs in a child.

    Args:
        model: a GGUF file, best of the full precision.
        corpora: UTF-8 texts.
        output: the GGUF file to write; it appears whole or not at all.
        ctx: tokens of a chunk.
        chunks: how many at most, those of `resume` included; None for all.
        threads: None for the machine's fast cores.
        progress: (chunks done, chunks in all, "chunks").
        resume: a matrix of the same model, corpora and context to go on from.
        output_weight: collect for output.weight too.
        save_seconds: how often what there is goes to `OUTPUT.partial`.

    Raises:
        InputError: a file is broken or too short, `resume` does not fit, or the model computes what is not finite.
        CapacityError: memory does not suffice.
        FileError: the output cannot be written, or another run writes it; found before the work.
    """
    corpus = read_corpus(corpora)
    origin = _origin(model, corpus)
    earlier = _earlier(resume, origin, ctx) if resume is not None else None
    datasets = tuple(file.name for file in corpus.files)
    partial = partial_path(output)
    started = earlier.chunk_count if earlier is not None else 0

    def importance(found: _Found) -> Importance:
        return Importance(found.entries, datasets, found.chunks, ctx, output, origin)

    task = _Task(model, corpus, ctx, chunks, threads, output_weight, save_seconds, started)
    known = dict(earlier.entries) if earlier is not None else {}
    # opened before the hours of work: nobody else may write it, and a folder that cannot be written to shows now
    with OutputFile(output, 0) as file, Worker(_collect, task, known, subject=model) as child:
        for event in child:
            if isinstance(event, _Found):
                write_importance(partial, importance(event))
            elif isinstance(event, Progress) and progress is not None:
                progress(event.done, event.total, event.label)
        found: _Found = child.result
        file.write(0, encode_importance(importance(found)))
        file.commit()
    partial.unlink(missing_ok=True)
    coverage = Importance(found.entries).coverage
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
        entries=len(found.entries),
        coverage=coverage,
        notes=notes,
    )


def partial_path(output: Path) -> Path:
    """Where a run for `output` keeps what it has so far; a whole imatrix file, of fewer chunks."""
    return output.with_name(output.name + ".partial")


def merge(parts: Sequence[Path], output: Path) -> Importance:
    """Add up importance matrices of one model from several texts, and write the sum.

    Raises:
        InputError: a file is no importance matrix, or they do not belong together.
        FileError: the output cannot be written.
    """
    merged = merge_importance([load_importance(path) for path in parts])
    write_importance(output, merged)
    return merged


def _origin(model: Path, corpus: Corpus) -> dict[str, str]:
    """Checksums by which a later run knows that it goes on with the same model and text.

    Of the model only the head: hashing 90 GB would take longer than a chunk, and another quantization or
    merge of the same shape is told apart by its metadata or its size.
    """
    header = read_header(model)
    digest = hashlib.sha256(f"{model.stat().st_size} {header.metadata} {header.tensors}".encode("utf-8", "replace"))
    texts = hashlib.sha256(" ".join(file.sha256 for file in corpus.files).encode())
    return {"model": digest.hexdigest(), "corpus": texts.hexdigest()}


def _earlier(path: Path, origin: Mapping[str, str], ctx: int) -> Importance:
    """The matrix to go on from, if it fits."""
    earlier = load_importance(path)
    if not earlier.origin:
        raise InputError(
            f"{path} does not say which model and text it was made from.",
            "Only files of `localmix imatrix` can be gone on with; `--merge` adds others up.",
        )
    for name, meaning in (("model", "another model"), ("corpus", "another text")):
        if earlier.origin.get(name) != origin[name]:
            raise InputError(
                f"{path} was made from {meaning}.", "Start without --resume, and add the two up with --merge."
            )
    if earlier.chunk_size != ctx:
        raise InputError(
            f"{path} was made with chunks of {earlier.chunk_size} tokens, not {ctx}.",
            f"Add --ctx {earlier.chunk_size}.",
        )
    return earlier


@dataclass(frozen=True)
class _Task:
    """What the child is to do; see `collect`."""

    model: Path
    corpus: Corpus
    ctx: int
    limit: int | None
    threads: int | None
    output_weight: bool
    save_seconds: float
    started: int


@dataclass(frozen=True)
class _Found:
    """What the child sends back, at the end and every now and then before."""

    entries: dict[str, Entry]
    chunks: int
    perplexity: float | None = None
    error: float | None = None


def _collect(channel: Channel, task: _Task, earlier: dict[str, Entry]) -> _Found:
    threads = task.threads or default_threads()
    with Model(task.model, cancelled=channel.cancelled) as model:
        vocabulary = model.vocabulary
        every = split(
            model.tokenize(task.corpus.text),
            task.ctx,
            name=task.corpus.name,
            limit=task.limit,
            bos=vocabulary.bos if vocabulary.add_bos else None,
        )
        chunks = every[task.started :]
        if not len(chunks):
            return _Found(earlier, task.started)
        # as many side by side as llama-imatrix has, whatever the cells cost: sums in another order have other bits
        layout = Layout(task.ctx, max(1, BATCH // task.ctx))
        collector = Collector(earlier, task.output_weight)
        callback = EvalCallback(collector.wanted, collector.computed)
        tally = Tally(chunks, threads)
        channel.progress(task.started, len(every), "chunks")
        saved = time.monotonic()
        with layout.open(model, threads, channel, callback) as context, tally:
            for part in decode_chunks(context, chunks, layout, logits_from=0):
                tally.add(part)
                if part.start + part.length < task.ctx:
                    continue
                done = task.started + part.first_chunk + part.sequences
                channel.progress(done, len(every), "chunks")
                if time.monotonic() - saved >= task.save_seconds and done < len(every):
                    channel.emit(_Found(collector.entries(), done))
                    saved = time.monotonic()
        return _Found(collector.entries(), len(every), tally.perplexity, tally.error)


class Collector:
    """Sums the squares of what goes into each weight: the two functions of an `EvalCallback`.

    Sums are float32 and grow by one row after the other, in llama-imatrix's order. Where a text repeats
    itself that rounds to one side (1e-4 after 57,000 tokens), so a better sum would be another one.

    Args:
        earlier: what other chunks have given, to go on from.
        output_weight: count output.weight too.
    """

    def __init__(self, earlier: Mapping[str, Entry] | None = None, output_weight: bool = False) -> None:
        known = dict(earlier or {})
        self._sums: dict[str, NDArray[np.float32]] = {name: entry.sums.copy() for name, entry in known.items()}
        self._counts = {name: entry.counts.astype(np.int64) for name, entry in known.items()}
        self._output_weight = output_weight
        self._operations = operations()
        self._space = np.empty((0, 0), np.float32)

    def wanted(self, tensor: Tensor) -> bool:
        """Whether a node is a product with a weight of a block, on enough rows."""
        if tensor.op == self._operations.mul_mat_id:
            return True
        if tensor.op != self._operations.mul_mat:
            return False
        activations = tensor.src[1].contents
        if activations.ne[1] < FEWEST_ROWS or activations.type != TensorType.F32:
            return False
        name = weight_name(tensor.src[0].contents)
        return name.startswith("blk.") or (self._output_weight and name == "output.weight")

    def computed(self, tensor: Tensor) -> None:
        """Add the input of a product to its weight's sums.

        Raises:
            InputError: it is not finite.
        """
        weight = tensor.src[0].contents
        values = read(tensor.src[1].contents, np.float32)
        name, columns = weight_name(weight), values.shape[-1]
        matrices = int(weight.ne[2] * weight.ne[3])
        sums = self._sums.setdefault(name, np.zeros((matrices, columns), np.float32))
        if tensor.op == self._operations.mul_mat_id:
            counts = self._counts.setdefault(name, np.zeros(matrices, np.int64))
            self._add_routed(sums, counts, values[0], read(tensor.src[2].contents, np.int32)[0, 0])
        else:
            counts = self._counts.setdefault(name, np.zeros(1, np.int64))
            for outer, inner in np.ndindex(values.shape[:2]):
                # activations of more dimensions than their weight go round its matrices
                matrix = outer % weight.ne[3] * weight.ne[2] + inner % weight.ne[2]
                self._add(sums[matrix], values[outer, inner])
            counts += int(np.prod(values.shape[:3])) // matrices
        if not np.isfinite(sums).all():
            raise InputError(
                f"The input of {name} is not finite: the model's weights or its computation are broken.",
                "`localmix quantize F32` of its checkpoint names a weight that is NaN or Inf, and its place.",
            )

    def entries(self) -> dict[str, Entry]:
        """What was collected, by the weight's name."""
        return {
            name: Entry(sums.copy(), self._counts[name].astype(np.float32)) for name, sums in sorted(self._sums.items())
        }

    def _add_routed(
        self,
        sums: NDArray[np.float32],
        counts: NDArray[np.int64],
        values: NDArray[np.float32],
        ids: NDArray[np.int32],
    ) -> None:
        """Add each row to the expert that it goes to.

        Args:
            sums, counts: `[experts, columns]` and `[experts]`, changed.
            values: `[tokens, experts used, columns]`, or `[tokens, 1, columns]` where they read the same row.
            ids: expert of each `[tokens, experts used]`.
        """
        # first choices of all tokens, then second choices: llama-imatrix's order
        chosen = ids.T.ravel()
        slots, tokens = np.divmod(np.arange(chosen.size), len(ids))
        slots %= values.shape[1]
        for expert in np.unique(chosen):
            rows = np.flatnonzero(chosen == expert)
            self._add(sums[expert], values[tokens[rows], slots[rows]])
            counts[expert] += len(rows)

    def _add(self, sums: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
        """Add the squares of rows to sums, changed, in float32 and row by row."""
        count, columns = rows.shape
        if self._space.shape[0] <= count or self._space.shape[1] != columns:
            self._space = np.empty((count + 1, columns), np.float32)
        space = self._space[: count + 1]
        space[0] = sums
        np.square(rows, out=space[1:])
        # along the first axis numpy adds whole rows in their order, without the pairs of its other sums
        np.add.reduce(space, axis=0, out=sums)
