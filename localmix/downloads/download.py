"""Files of the hub onto the disk: resumed where an earlier run stopped, and checked before they get their name.

What has come lies in `.NAME.part`; beside it `.NAME.part.json` says how much of that is safely on the disk, and of
which file it is. A kill or a power cut costs the last seconds, a dropped connection nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.downloads.hub import Answer, HubFile, Passing, Patience, Repository, Stop, Stopped, open_range
from localmix.errors import CapacityError, FileError, LocalmixError, NetworkError
from localmix.output import file_error
from localmix.sizes import size

Progress = Callable[[int, int, str], None]

# A server often limits a connection, not a client; more than these few it would take for an attack.
CONNECTIONS = 4
# How much, or how many seconds, a kill can cost.
_NOTE_BYTES, _NOTE_SECONDS = 64 << 20, 2.0
_BLOCK = 4 << 20

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True)
class Download:
    """A file of the hub and the place that it gets."""

    file: HubFile
    path: Path

    @property
    def partial(self) -> Path:
        """What has come of it."""
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def note(self) -> Path:
        """How much of that counts."""
        return self.path.with_name(f".{self.path.name}.part.json")

    @property
    def missing(self) -> int:
        """Bytes that are still to come, as far as an earlier run's note can be believed."""
        with contextlib.suppress(OSError):
            return max(0, self.file.bytes - min(self.partial.stat().st_size, _read_note(self)[0]))
        return self.file.bytes


def check_space(downloads: Sequence[Download], folder: Path) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        CapacityError: it has not.
    """
    needed = sum(download.missing for download in downloads)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(
            f"{folder} has {size(free)} free, and {size(needed)} are to come.",
            "Free some space, choose files with --include, or let LOCALMIX_HOME name a folder on another disk.",
        )


def fetch_all(
    repository: Repository,
    downloads: Sequence[Download],
    *,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    finished: Callable[[Download, str], None] | None = None,
) -> None:
    """Fetch files, several at a time.

    Args:
        progress: called with (bytes here, bytes in all, what is coming).
        finished: called with each file that is there and checked, and its SHA-256; never twice at once.

    Raises:
        NetworkError: a file does not come, or is not the one that the hub promised: then it is deleted.
        CapacityError, FileError: the disk is full or refuses.
    """
    stop = Stop()
    board = _Board(downloads, progress)

    def run(download: Download) -> tuple[Download, str]:
        return download, fetch(repository, download, stop, board.watch(download))

    with ThreadPoolExecutor(connections, thread_name_prefix="download") as pool:
        futures = [pool.submit(run, download) for download in downloads]
        waiting: set[Future[tuple[Download, str]]] = set(futures)
        try:
            while waiting:
                # a timeout lets Ctrl-C through on Windows, where a wait for ever is deaf
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                board.report()
                for future in done:
                    download, sha256 = future.result()
                    if finished is not None:
                        finished(download, sha256)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def short_name(name: str) -> str:
    """A file's name as it fits beside a bar: without its folders and its ending, never longer than 24 characters."""
    stem = name.rpartition("/")[2].removesuffix(".safetensors").removesuffix(".gguf")
    return stem if len(stem) <= 24 else f"…{stem[-23:]}"


class _Board:
    """How far every file is: threads write, one reports."""

    def __init__(self, downloads: Sequence[Download], progress: Progress | None) -> None:
        self._total = sum(download.file.bytes for download in downloads)
        self._here: dict[str, int] = {}
        self._sizes = {download.file.name: download.file.bytes for download in downloads}
        self._progress = progress

    def watch(self, download: Download) -> Callable[[int], None]:
        def note(here: int) -> None:
            self._here[download.file.name] = here

        return note

    def report(self) -> None:
        if self._progress is None:
            return
        here = dict(self._here)
        whole = sum(size == self._sizes[name] for name, size in here.items())
        coming = [(name, size) for name, size in here.items() if size < self._sizes[name]]
        label = f"{whole}/{len(self._sizes)} files"
        if coming:
            name, size = coming[0]
            label += f", {short_name(name)} {100 * size // self._sizes[name]} %"
        self._progress(sum(here.values()), self._total, label)


def fetch(
    repository: Repository, download: Download, stop: Stop, watch: Callable[[int], None] = lambda here: None
) -> str:
    """Fetch one file, or what is missing of it.

    Args:
        stop: set from another thread to end it; what has come stays.
        watch: called with the bytes that are here.

    Returns:
        Its SHA-256 in hex.

    Raises:
        NetworkError: it does not come, or is another file than promised.
        CapacityError, FileError: the disk is full or refuses.
        Stopped: `stop` was set.
    """
    try:
        resumed = download.missing < download.file.bytes
        found = _fetch_once(repository, download, stop, watch)
        if found is None and resumed:  # what an earlier run left may have been the damage
            watch(0)
            found = _fetch_once(repository, download, stop, watch)
    except OSError as error:
        raise _disk_error(error, download.path) from error
    if found is None:
        raise NetworkError(
            f"{download.file.name} of {repository.name} came with the right size and the wrong content, and was"
            f" deleted: its checksum is not {download.file.checksum}.",
            "Something on the way may change downloads. Try again, or without the mirror that HF_ENDPOINT may name.",
        )
    return found


def _disk_error(error: OSError, path: Path) -> LocalmixError:
    told = file_error(error, path, "write")
    if not isinstance(told, CapacityError):
        return told
    if error.errno == errno.EFBIG:
        return CapacityError(told.message, "LOCALMIX_HOME may name a disk with another file system.")
    return CapacityError(
        told.message, "Make room; the same command goes on where this one stopped. LOCALMIX_HOME may name another disk."
    )


def _fetch_once(repository: Repository, download: Download, stop: Stop, watch: Callable[[int], None]) -> str | None:
    """The SHA-256 of the file once it is in its place, or None: the content was wrong and is deleted."""
    with _Partial(download) as partial:
        watch(partial.here)
        patience = Patience(download.file.name, stop)
        while partial.here < download.file.bytes or not partial.asked:
            if stop.is_set():
                raise Stopped
            before = partial.here
            try:
                with open_range(repository, download.file, stop, partial.here, validator=partial.validator) as answer:
                    partial.take(answer, stop, watch)
                if partial.here < download.file.bytes:
                    raise Passing("the connection is closed early")
            except Passing as error:
                if partial.here > before:
                    patience.encourage()
                patience.wait(error.reason, error.seconds)
        if not partial.is_right():
            partial.discard()
            return None
        return partial.finish()


class _Partial:
    """What has come of a file, with its checksums so far."""

    def __init__(self, download: Download) -> None:
        self._download = download
        self._size = download.file.bytes
        download.path.parent.mkdir(parents=True, exist_ok=True)
        noted, self.validator = _read_note(download)
        descriptor = os.open(download.partial, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.here = min(noted, os.fstat(descriptor).st_size, self._size)
        self.asked = self.here > 0  # an empty file is asked for once, so that a refusal shows
        self._noted_at = time.monotonic()
        self._noted = self.here
        self._begin_sums()
        for start in range(0, self.here, _BLOCK):
            self._add_to_sums(self._file.read(min(_BLOCK, self.here - start)))
        os.truncate(descriptor, self.here)

    def _begin_sums(self) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {self._size}\0".encode(), usedforsecurity=False)

    def _add_to_sums(self, block: bytes) -> None:
        self._sha256.update(block)
        if not self._download.file.sha256:
            self._git.update(block)

    def take(self, answer: Answer, stop: Stop, watch: Callable[[int], None]) -> None:
        """Append what an answer brings.

        Raises:
            NetworkError: more comes than the file has.
            Stopped: another thread ended the run.
        """
        self.asked = True
        if answer.start != self.here:
            self.here = 0
            self._file.seek(0)
            self._file.truncate(0)
            self._begin_sums()
            self._keep()
        self.validator = answer.validator
        for block in answer.blocks:
            if stop.is_set():
                raise Stopped
            if self.here + len(block) > self._size:
                self.discard()
                raise NetworkError(
                    f"More comes of {self._download.file.name} than its {self._size:,} bytes; it was deleted.",
                    "Try again, or without the mirror that HF_ENDPOINT may name.",
                )
            self._write(block)
            self._add_to_sums(block)
            self.here += len(block)
            watch(self.here)
            if self.here - self._noted >= _NOTE_BYTES or time.monotonic() - self._noted_at >= _NOTE_SECONDS:
                self._keep()

    def _write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def _keep(self) -> None:
        """Make what has come durable, then note it."""
        os.fsync(self._file.fileno())
        note = {"checksum": self._download.file.checksum, "bytes": self.here, "etag": self.validator}
        # no output.write_atomically: a note that is lost or torn costs nothing but time
        fresh = self._download.note.with_name(f"{self._download.note.name}.new")
        with contextlib.suppress(OSError):
            fresh.write_text(json.dumps(note), "utf-8")
            os.replace(fresh, self._download.note)
        self._noted, self._noted_at = self.here, time.monotonic()

    def is_right(self) -> bool:
        """Whether the content is the one that the hub promised."""
        if self._download.file.sha256:
            return self._sha256.hexdigest() == self._download.file.sha256
        return self._git.hexdigest() == self._download.file.blob

    def finish(self) -> str:
        """Give the file its name; its SHA-256."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._download.partial, self._download.path)
        self._download.note.unlink(missing_ok=True)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Delete what has come."""
        self._file.close()
        self._download.partial.unlink(missing_ok=True)
        self._download.note.unlink(missing_ok=True)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._keep()
            self._file.close()


def _read_note(download: Download) -> tuple[int, str]:
    """How many bytes of the partial file count, and the ETag they came with."""
    try:
        note: Any = json.loads(download.note.read_text("utf-8"))
        if isinstance(note, Mapping) and note.get("checksum") == download.file.checksum:
            here, validator = note.get("bytes"), note.get("etag")
            if type(here) is int and here >= 0 and isinstance(validator, str):
                return here, validator
    except (OSError, ValueError, RecursionError):
        pass
    return 0, ""


def seed(download: Download, head: bytes) -> None:
    """Begin a file with its first bytes, which came already; nothing is done if more of it has.

    Raises:
        FileError, CapacityError: they cannot be written.
    """
    if not head or _read_note(download)[0]:
        return
    try:
        download.note.unlink(missing_ok=True)
        download.partial.unlink(missing_ok=True)
        download.partial.write_bytes(head)
        note = {"checksum": download.file.checksum, "bytes": len(head), "etag": ""}
        download.note.write_text(json.dumps(note), "utf-8")
    except OSError as error:
        raise _disk_error(error, download.path) from error


def checksum_of(path: Path, file: HubFile) -> tuple[bool, str]:
    """Whether a file is the one that the hub has, and its SHA-256 in hex.

    Raises:
        FileError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    git = hashlib.sha1(f"blob {file.bytes}\0".encode(), usedforsecurity=False)
    try:
        with path.open("rb") as opened:
            while block := opened.read(_BLOCK):
                sha256.update(block)
                if not file.sha256:
                    git.update(block)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    return (sha256 if file.sha256 else git).hexdigest() == file.checksum, sha256.hexdigest()
