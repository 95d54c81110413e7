"""Stream: produce every slice of every output from one read of the source, on all cores, in bounded memory.

What is done is noted in a journal beside each output every few seconds, so that a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from localmix import __version__
from localmix.errors import InputError, LocalmixError
from localmix.importance import Importance
from localmix.native.kernels import decode_rows, quantize_rows
from localmix.output import RESUMABLE, OutputFile, check_outputs
from localmix.plan import Plan, PlannedTensor
from localmix.sources.base import Source, TensorInfo
from localmix.sources.positional import identity, note_reads
from localmix.tensor_types import FLOAT_TYPES, TensorType, widen

if TYPE_CHECKING:
    from localmix.downloads.arrivals import Arrivals

Progress = Callable[[int, int, str], None]

# Weights in a slice: 4 MB as float32. Small enough that a handful of slices in flight stay far below 300 MB and
# that no core is left with a long last slice, large enough that Python's part of the work does not show.
SLICE_WEIGHTS = 1 << 20


# Seconds between two entries in the journal: what a kill can cost.
JOURNAL_SECONDS = 5.0


@dataclass(frozen=True)
class _Slice:
    """Rows of one tensor, never of two experts: each expert has an importance row of its own."""

    number: int
    tensor: int
    start: int
    stop: int
    expert: int


def _slices(tensors: Sequence[TensorInfo]) -> Iterator[_Slice]:
    number = 0
    for index, tensor in enumerate(tensors):
        rows_per_expert = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        step = max(1, SLICE_WEIGHTS // tensor.columns)
        for first in range(0, tensor.rows, rows_per_expert):
            for start in range(first, first + rows_per_expert, step):
                stop = min(start + step, first + rows_per_expert)
                yield _Slice(number, index, start, stop, first // rows_per_expert)
                number += 1


def _fingerprint(source: Source, plan: Plan, importance: Importance | None) -> str:
    """What the bytes of an output depend on; a partial file of another fingerprint is not gone on with."""
    digest = hashlib.sha256(f"{__version__} {SLICE_WEIGHTS}".encode())
    digest.update(source.recipe.encode())
    for header in plan.headers:
        digest.update(header)
    for path in source.files():
        digest.update(identity(path).encode())
    if importance is not None:
        digest.update(bytes([importance.fill_with_ones]))
        for name, entry in sorted(importance.entries.items()):
            digest.update(name.encode())
            digest.update(entry.sums.tobytes())
            digest.update(entry.counts.tobytes())
    return digest.hexdigest()


def write_outputs(
    source: Source,
    outputs: Sequence[tuple[Plan, Path]],
    importance: Importance | None = None,
    *,
    threads: int,
    progress: Progress | None = None,
    journal_seconds: float = JOURNAL_SECONDS,
    arrivals: Arrivals | None = None,
) -> None:
    """Write one file for each plan, reading and widening each weight once.

    All files appear together at the end, or none does. The same call after a kill makes only what is missing; with
    `arrivals` also after any other stop that is no fault of the model.

    Args:
        outputs: plans of this source, each with its final path.
        importance: the importance matrix for all of them.
        threads: slices in work at once.
        progress: called with (weights done, weights in all, tensor's name).
        journal_seconds: how often what is done is made durable and noted.
        arrivals: brings the source's files one after the other.

    Raises:
        InputError: NaN or Inf in the source (the tensor and the place are named), a value that F16 cannot hold,
            or the source changed meanwhile.
        CapacityError, FileError, UsageError: see `output.check_outputs`.
    """
    if not source.files():
        raise InputError(f"{source.path} has a config.json but no weights.", "Download its safetensors files too.")
    check_outputs(
        [part for plan, path in outputs for part in zip(plan.paths(path), plan.part_bytes, strict=True)],
        source.files(),
        arrivals.staged if arrivals else (),
    )
    with ExitStack() as stack:
        targets: list[_Target] = []
        for plan, path in outputs:
            fingerprint = _fingerprint(source, plan, importance)
            files = []
            for part, size, header in zip(plan.paths(path), plan.part_bytes, plan.headers, strict=True):
                file = stack.enter_context(OutputFile(part, size, fingerprint, resumable=arrivals is not None))
                file.write(0, header)
                files.append(file)
            targets.append(_Target(plan.tensors, files))
        slices = list(_slices(source.tensors))
        all_files = [file for target in targets for file in target.files]
        done = {part.number for part in slices if all(target.holds(part) for target in targets)}
        with _Journal(all_files, done, journal_seconds) as journal:
            feed = _Feed(source, [part for part in slices if part.number not in done], arrivals)
            _run(_SliceWorker(source, targets, importance), slices, feed, journal, threads, progress)
        source.check_unchanged()
        for file in all_files:
            file.settle()
        for file in all_files:  # nothing but renames: all files appear in the same moment
            file.commit()


@dataclass(frozen=True)
class _Target:
    """One output: its planned tensors and its files, more than one when it is split."""

    tensors: Sequence[PlannedTensor]
    files: Sequence[OutputFile]

    def holds(self, part: _Slice) -> bool:
        """Whether an earlier, killed run already placed this slice."""
        return part.number in self.files[self.tensors[part.tensor].part].done


class _Journal:
    """Notes every few seconds, from a thread of its own, which slices every output holds for good."""

    def __init__(self, files: Sequence[OutputFile], done: set[int], seconds: float) -> None:
        self._files = files
        self._seconds = seconds
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.done = done  # what all outputs have
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_on, name="journal", daemon=True)

    def _keep_on(self) -> None:
        try:
            while not self._stop.wait(self._seconds):
                self.note()
        except BaseException as error:  # told by the thread that waits for the slices
            self._error = error

    def note(self) -> None:
        """Make what is done durable, and note it; in one thread at a time, so that no note is older than the last."""
        with self._lock:
            done = self.done.copy()
            for file in self._files:
                file.keep(done | file.done)

    def check(self) -> None:
        """Raise what went wrong while keeping the journal: a full or broken disk."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> _Journal:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # a sync that the disk is slow to answer must not hold up a Ctrl-C
        self._thread.join(timeout=1 if error is not None else None)


class _SliceWorker:
    """Makes one slice of all outputs; called from several threads."""

    def __init__(
        self,
        source: Source,
        targets: Sequence[_Target],
        importance: Importance | None,
    ) -> None:
        self.source = source
        self._targets = targets
        self._importance = importance
        self._rows: tuple[str, npt.NDArray[np.float32] | None] = "", None
        self._lock = threading.Lock()

    def _importance_row(self, info: TensorInfo, expert: int) -> npt.NDArray[np.float32] | None:
        if self._importance is None:
            return None
        with self._lock:  # the mean is taken once for a tensor, not for each of its slices
            if self._rows[0] != info.name:
                self._rows = info.name, self._importance.rows(info)
            rows = self._rows[1]
        return None if rows is None else np.ascontiguousarray(rows[expert])

    def __call__(self, part: _Slice) -> int:
        """Read, quantize and place one slice; returns its number of weights."""
        info = self.source.tensors[part.tensor]
        stored = self.source.read(info, part.start, part.stop)
        wide: npt.NDArray[np.float32] | None = None
        if info.type in FLOAT_TYPES:
            _check_finite(stored, info, part.start, self.source)
        for target in self._targets:
            if target.holds(part):
                continue
            tensor = target.tensors[part.tensor]
            if tensor.type == info.type:
                encoded: npt.NDArray[Any] = np.ascontiguousarray(stored)
            else:
                if wide is None:
                    wide = decode_rows(info.type, stored, info.columns)
                encoded = quantize_rows(tensor.type, wide, self._importance_row(info, part.expert))
                if tensor.type == TensorType.F16:
                    _check_half(encoded, wide, info, part.start, self.source)
            row = tensor.bytes // info.rows
            data = encoded.reshape(-1).view(np.uint8).data
            target.files[tensor.part].write(tensor.offset + part.start * row, data)
        return (part.stop - part.start) * info.columns


def _check_finite(stored: npt.NDArray[Any], info: TensorInfo, start: int, source: Source) -> None:
    """Find NaN and Inf by their exponent bits, which costs less than widening."""
    if info.type == TensorType.F32:
        bits, exponent = stored.view(np.uint32), np.uint32(0x7F800000)
    else:
        bits = stored.view(np.uint16)
        exponent = np.uint16(0x7F80 if info.type == TensorType.BF16 else 0x7C00)
    bad = (bits & exponent) == exponent
    if bad.any():
        row, column = (int(at) for at in np.argwhere(bad)[0])
        value = widen(stored[row : row + 1], info.type)[0, column]
        raise InputError(
            f"{source.path}: {info.name} holds {value} at row {start + row}, column {column}.",
            "The checkpoint is damaged or was never finite; download or merge it again.",
        )


def _check_half(
    encoded: npt.NDArray[np.uint8],
    wide: npt.NDArray[np.float32],
    info: TensorInfo,
    start: int,
    source: Source,
) -> None:
    overflow = np.isinf(encoded.view(np.float16))
    if overflow.any():
        row, column = (int(at) for at in np.argwhere(overflow)[0])
        raise InputError(
            f"{source.path}: {info.name} holds {wide[row, column]:g} at row {start + row}, column {column},"
            " which F16 cannot hold.",
            "Use BF16 instead of F16.",
        )


class _Feed:
    """The slices that are still to be made, in an order in which the files of the source may come.

    Args:
        todo: the slices.
        arrivals: brings the files; None when all are here.
    """

    def __init__(self, source: Source, todo: Sequence[_Slice], arrivals: Arrivals | None) -> None:
        self._arrivals = arrivals
        self._todo = deque(todo)
        self._needs: dict[int, frozenset[Path]] = {}
        self._users: Counter[Path] = Counter()
        if arrivals is None:
            return
        place = {path: number for number, path in enumerate(source.files())}
        for part in todo:
            needs = _files_of(source, part)
            self._needs[part.number] = needs
            self._users.update(needs)
        last = {number: max((place[path] for path in needs), default=-1) for number, needs in self._needs.items()}
        self._todo = deque(sorted(todo, key=lambda part: last[part.number]))
        arrivals.begin(sorted(self._users, key=place.__getitem__))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to be handed out."""
        return not self._todo

    @property
    def label(self) -> str:
        """What is waited for."""
        return self._arrivals.label if self._arrivals else ""

    def next(self) -> _Slice | None:
        """A slice that can be made now."""
        if not self._todo:
            return None
        if self._arrivals and not self._arrivals.are_here(self._needs[self._todo[0].number]):
            return None
        return self._todo.popleft()

    def wait(self) -> None:
        """Wait for the files of the next slice; nothing is being made meanwhile."""
        assert self._arrivals is not None
        self._arrivals.widen()
        self._arrivals.wait(0.2)

    def finish(self, part: _Slice, journal: _Journal) -> None:
        """A slice was made: files that no other needs can go, once its bytes are safe."""
        needs = self._needs.get(part.number, frozenset())
        self._users.subtract(needs)
        unused = [path for path in needs if not self._users[path]]
        if unused and self._arrivals:
            journal.note()
            for path in unused:
                self._arrivals.release(path)


def _files_of(source: Source, part: _Slice) -> frozenset[Path]:
    """The files that a slice comes from, as far as they are not here: those of its first and its last row."""
    info = source.tensors[part.tensor]
    with note_reads() as found:
        source.read(info, part.start, part.start + 1)
        source.read(info, part.stop - 1, part.stop)
    return frozenset(found)


def _run(
    worker: _SliceWorker,
    slices: Sequence[_Slice],
    feed: _Feed,
    journal: _Journal,
    threads: int,
    progress: Progress | None,
) -> None:
    """Keep the threads busy with a short queue, and stop them all at the first error or Ctrl-C."""
    source = worker.source
    total = source.parameters
    done = sum(
        (part.stop - part.start) * source.tensors[part.tensor].columns for part in slices if part.number in journal.done
    )
    waiting: dict[Future[int], _Slice] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            while True:
                while len(waiting) < 2 * threads and (part := feed.next()) is not None:
                    waiting[pool.submit(worker, part)] = part
                if not waiting and feed.is_empty:
                    return
                if not waiting:
                    if progress is not None:
                        progress(done, total, feed.label)
                    feed.wait()
                    journal.check()
                    continue
                # a timeout lets Ctrl-C through on Windows, where a wait for ever is deaf
                finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                journal.check()
                for future in finished:
                    part = waiting.pop(future)
                    done += future.result()
                    journal.done.add(part.number)
                    feed.finish(part, journal)
                    if progress is not None:
                        progress(done, total, source.tensors[part.tensor].name)
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if feed.label and isinstance(error, RESUMABLE):
                with contextlib.suppress(LocalmixError):  # the first error is the one to tell
                    journal.note()
            raise
