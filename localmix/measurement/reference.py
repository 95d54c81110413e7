"""The logits of a reference model over a corpus, kept on disk: each further model then costs one decode, not two.

They are stored as they are, in float32, so that a model measured against itself reads exactly 0: four bytes for
each scored token and word of the vocabulary, 3.3 GB for 25,600 tokens and 32,000 words. The files lie in the
user's cache folder under a size limit; those not used for longest go first.

A file: `HEAD` bytes with a JSON object, float64 `[chunks, scored]` likelihoods, float32 `[chunks, scored, vocabulary]`
logits, in this machine's byte order. The likelihoods are computed again from the logits when they are read, so
that a damaged file shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from localmix.errors import CapacityError, FileError, InputError, LocalmixError
from localmix.measurement.corpus import Corpus
from localmix.measurement.perplexity import BATCH, ENGINE, MICRO_BATCH, Conditions, Part, Tally
from localmix.output import OutputFile, file_error, write_atomically
from localmix.sizes import size as readable
from localmix.sources.positional import PositionalFile
from localmix.worker import Report

FORMAT = 1
HEAD = 4096
SUFFIX = ".logits"
# What a cache must leave free on the disk for everybody else.
MARGIN = 1 << 30
DEFAULT_LIMIT = 20 << 30

_BLOCK = 1 << 22
_DIGESTS = "digests.json"


@dataclass(frozen=True)
class Shape:
    """What a file holds.

    Attributes:
        chunks, scored: scored tokens of each chunk.
        vocabulary: logits of each token.
        tokens_sha256: of the chunks' tokens: another tokenizer has others.
    """

    chunks: int
    scored: int
    vocabulary: int
    tokens_sha256: str

    @classmethod
    def of(cls, chunks: NDArray[np.int32], vocabulary: int) -> Shape:
        """The shape for chunks, int32 `[chunks, positions]`."""
        digest = hashlib.sha256(np.ascontiguousarray(chunks, "<i4").tobytes()).hexdigest()
        return cls(len(chunks), chunks.shape[1] - 1 - chunks.shape[1] // 2, vocabulary, digest)

    @property
    def rows(self) -> int:
        """Scored tokens in all."""
        return self.chunks * self.scored

    @property
    def logits_start(self) -> int:
        """Offset of the logits in the file."""
        return HEAD + 8 * self.rows

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.logits_start + 4 * self.rows * self.vocabulary


@dataclass(frozen=True)
class Cache:
    """Where references are kept, and how many bytes they may take together."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @classmethod
    def of_user(cls, limit: int = DEFAULT_LIMIT) -> Cache:
        """The user's own cache folder."""
        return cls(platformdirs.user_cache_path("localmix", appauthor=False) / "references", limit)

    def path_for(
        self, files: Sequence[Path], corpus: Corpus, conditions: Conditions, progress: Report | None = None
    ) -> Path:
        """The file for a reference under these conditions; it may not exist yet.

        Args:
            files: of the reference; they are read whole unless their digests are known.
            progress: (bytes done, bytes in all, file's name) while they are read.

        Raises:
            FileError: one cannot be read.
        """
        key: dict[str, Any] = {
            "format": FORMAT,
            "byte_order": sys.byteorder,
            "model": self._digests(files, progress),
            "corpus": corpus.sha256,
            "engine": ENGINE,
            "batch": [BATCH, MICRO_BATCH],
            # threads change no more than the last bits
            **{name: value for name, value in asdict(conditions).items() if name != "threads"},
        }
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}{SUFFIX}"

    def make_room(self, size: int) -> None:
        """Delete files, those not used for longest first, until one of `size` bytes can come.

        Raises:
            CapacityError: it cannot: the limit or the disk is too small.
            FileError: the folder cannot be made.
        """
        if size > self.limit:
            raise CapacityError(
                f"The reference's logits take {readable(size)}, and the cache's limit is {readable(self.limit)}.",
                "Raise it with --cache-limit, or measure fewer chunks.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, self.folder, "write") from error
        self._sweep()
        files = sorted(self._files(), key=lambda found: found[0])
        total = sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in files:
            if total + size <= self.limit and self._free() >= size + MARGIN:
                break
            with contextlib.suppress(OSError):  # in use, on Windows
                path.unlink()
                total -= bytes_
        free = self._free()
        if free < size + MARGIN or total + size > self.limit:
            raise CapacityError(
                f"{self.folder} has {readable(free)} free, and the reference's logits take {readable(size)};"
                f" {readable(MARGIN)} are left for others.",
                "Free some space, or measure fewer chunks.",
            )

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _files(self) -> Iterable[tuple[float, int, Path]]:
        """When each was used last, its size and its path."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path

    def _sweep(self) -> None:
        """Delete what killed runs left; what a living one writes is locked and stays."""
        for partial in self.folder.glob(f".*{SUFFIX}.partial"):
            name = partial.name.removeprefix(".").removesuffix(".partial")
            with contextlib.suppress(LocalmixError, OSError), OutputFile(self.folder / name, 0):
                pass

    def _digests(self, files: Sequence[Path], progress: Report | None) -> list[str]:
        """SHA-256 of each file in hex; known ones are those whose path, size, time and inode are as they were."""
        known = self._known_digests()
        marks = {path: _mark(path) for path in files}
        total = sum(path.stat().st_size for path in files if marks[path] not in known)
        done = 0
        for path in files:
            if marks[path] in known:
                continue
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        done += len(block)
                        if progress is not None:
                            progress(done, total, f"checksum of {path.name}")
            except OSError as error:
                raise FileError(f"{path} cannot be read: {error.strerror}.") from error
            known[_mark(path)] = digest.hexdigest()
            marks[path] = _mark(path)
        if done:
            with contextlib.suppress(LocalmixError, OSError):  # then it is computed again the next time
                self.folder.mkdir(parents=True, exist_ok=True)
                fresh = dict(list(known.items())[-1000:])
                write_atomically(self.folder / _DIGESTS, json.dumps(fresh, indent=1).encode())
        return [known[mark] for mark in marks.values()]

    def _known_digests(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / _DIGESTS).read_text("utf-8"))
            return {str(mark): str(digest) for mark, digest in found.items()}
        except (OSError, ValueError, AttributeError):
            return {}  # none yet, or broken: it is only a shortcut


def _mark(path: Path) -> str:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    return f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


class Recorder:
    """Writes a reference while it is measured; use as a context manager, and `finish` at the end.

    Raises:
        CapacityError: the disk is too small.
        FileError: the file cannot be written, or another run writes it.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self._shape = shape
        self._file = OutputFile(path, shape.bytes)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def add(self, part: Part, tally: Tally) -> None:
        """Write the scored logits of a part."""
        start, end = tally.span(part)
        if start == end:
            return
        shape = self._shape
        for sequence in range(part.sequences):
            row = (part.first_chunk + sequence) * shape.scored + start - tally.first
            logits = part.logits[sequence, start - part.scored : end - part.scored]
            self._file.write(shape.logits_start + 4 * row * shape.vocabulary, _bytes(logits))

    def finish(self, nll: NDArray[np.float64], trained: int, memory: int) -> None:
        """Give the file its name.

        Args:
            nll: float64 `[chunks, scored]` of the reference.
            trained: tokens of context that it was trained with.
            memory: peak of the process that measured it.
        """
        text = json.dumps({"shape": asdict(self._shape), "trained_context": trained, "memory_bytes": memory})
        self._file.write(0, text.encode().ljust(HEAD))
        self._file.write(HEAD, _bytes(nll))
        self._file.commit()


class StoredReference:
    """A finished file; use as a context manager.

    Attributes:
        shape: what it holds.
        nll: float64 `[chunks, scored]`, negative log-likelihoods.
        trained_context: of the reference.
        memory_bytes: peak of the process that measured it.

    Raises:
        InputError: the file is damaged.
        FileError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = PositionalFile(path)
        self._buffers = threading.local()
        try:
            head = json.loads(self._file.read(0, min(HEAD, self._file.size)))
            self.shape = Shape(**head["shape"])
            self.trained_context = int(head["trained_context"])
            self.memory_bytes = int(head["memory_bytes"])
            if self._file.size != self.shape.bytes:
                raise ValueError("the size is not what the head says")
            self.nll = np.empty((self.shape.chunks, self.shape.scored))
            self._file.read_into(HEAD, _bytes(self.nll))
        except (ValueError, TypeError, KeyError) as error:
            self.close()
            raise self.damaged() from error
        except LocalmixError:
            self.close()
            raise

    def __enter__(self) -> StoredReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, chunk: int, start: int, end: int) -> NDArray[np.float32]:
        """Logits of a chunk's scored tokens `[start:end)`, counted from the first: float32 `[rows, vocabulary]`.

        In a buffer of the calling thread, which its next call overwrites.
        """
        shape = self.shape
        needed = (end - start) * shape.vocabulary
        buffer: NDArray[np.float32] | None = getattr(self._buffers, "rows", None)
        if buffer is None or buffer.size < needed:
            buffer = self._buffers.rows = np.empty(needed, np.float32)
        found = buffer[:needed]
        offset = shape.logits_start + 4 * (chunk * shape.scored + start) * shape.vocabulary
        self._file.read_into(offset, _bytes(found))
        return found.reshape(end - start, shape.vocabulary)

    def check(self, nll: NDArray[np.float64]) -> None:
        """Compare the likelihoods that were computed from the logits with those that were stored.

        Raises:
            InputError: they differ; the file has been deleted.
        """
        if not np.allclose(nll, self.nll, rtol=1e-6, atol=1e-6):
            raise self.damaged()

    def damaged(self) -> InputError:
        """The error for a file that does not hold what it should; deletes it."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        return InputError(
            f"The stored logits of the reference, {self.path}, were damaged; they have been deleted.",
            "Run the command again: it makes them anew.",
        )


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
