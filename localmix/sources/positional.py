"""Positional reads of a regular file: any offset, from any thread, without a shared file pointer.

The file is checked before it is opened (a FIFO or a device would block or answer without end) and its size
and modification time are remembered, so that a file that changes under a long run is noticed.

A stand-in takes the place of a file on the hub: the head of it, with the size that the whole file has. Models are
planned from stand-ins as they are from files. What is beyond the head is read from the folder `ARRIVED` beside it,
where the whole file lies for as long as it is here.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import FileError, InputError

# What a repository holds in place of a big file when it was cloned without Git LFS.
LFS_POINTER = b"version https://git-lfs"


# The folder beside stand-ins in which the whole files are, while they are here.
ARRIVED = ".arrived"

_STAND_IN = b"localmix stand-in\n"
_STAND_IN_LIMIT = 4096  # bytes of what it says before the head

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

# The stand-ins that were asked for more than their head, while `note_reads` is on.
_noted: ContextVar[set[Path] | None] = ContextVar("noted", default=None)


class NotHere(InputError):
    """A stand-in was asked for what only the whole file has.

    Attributes:
        path: the stand-in.
        stop: the end of what was asked for, in bytes from the start of the file.
    """

    def __init__(self, path: Path, stop: int) -> None:
        super().__init__(f"Only the head of {path.name} was fetched.", "Fetch the model with `localmix pull`.")
        self.path = path
        self.stop = stop


@dataclass(frozen=True)
class _StandIn:
    """What a stand-in says: `head` bytes of the file follow at `start`."""

    size: int
    identity: str
    start: int
    head: int


def write_stand_in(path: Path, size: int, identity: str, head: bytes) -> None:
    """Put a stand-in in the place of a file.

    Args:
        size: bytes of the whole file.
        identity: what tells the file from any other, such as its checksum.
        head: its first bytes.
    """
    told = json.dumps({"size": size, "identity": identity}).encode("ascii")
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(_STAND_IN + told + b"\n" + head)
    os.replace(fresh, path)


def read_head(path: Path) -> bytes:
    """The head in a stand-in; nothing of another file.

    Raises:
        InputError, FileError: as `PositionalFile`.
    """
    file = PositionalFile(path)
    try:
        return file.read(0, file.head_bytes)
    finally:
        file.close()


def _read_stand_in(descriptor: int, size: int) -> _StandIn | None:
    """What a file says if it is a stand-in, else None."""
    data = os.read(descriptor, len(_STAND_IN))
    if data != _STAND_IN:
        return None
    told, end, _ = os.read(descriptor, _STAND_IN_LIMIT).partition(b"\n")
    try:
        words = json.loads(told)
        whole, identity = words["size"], words["identity"]
    except (ValueError, TypeError, KeyError):
        return None
    if not end or type(whole) is not int or not isinstance(identity, str):
        return None
    start = len(_STAND_IN) + len(told) + 1
    return _StandIn(whole, identity, start, size - start)


@contextmanager
def note_reads() -> Iterator[set[Path]]:
    """The stand-ins that are asked for more than their head in this thread; they answer with zeros meanwhile."""
    found: set[Path] = set()
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def is_noting() -> bool:
    """Whether reads in this thread are only noted: what is made of their zeros is of no use."""
    return _noted.get() is not None


class PositionalFile:
    """A regular file opened for reading at offsets.

    Args:
        path: the file; symbolic links are followed (the hub's cache is made of them).

    Raises:
        InputError: the path is not a regular file.
        FileError: the file system refuses (missing, no permission, too many open files).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        # A FIFO put there between the two checks must not block the open either.
        flags = _READ_FLAGS | getattr(os, "O_NONBLOCK", 0)
        try:
            self._require_regular(os.stat(path))
            self._descriptor = os.open(path, flags)
            status = os.fstat(self._descriptor)
            self._require_regular(status)
            self._stand_in = _read_stand_in(self._descriptor, status.st_size)
        except OSError as error:
            self.close()
            raise FileError(f"{path} cannot be opened: {error.strerror or error}.") from error
        except InputError:
            self.close()
            raise
        self.size = self._stand_in.size if self._stand_in else status.st_size
        self._status = status.st_size, status.st_mtime_ns

    def _require_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{self.path} is not a regular file.", "A FIFO, a device or a folder cannot be read as one."
            )

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes, contiguous) from `offset` on.

        Raises:
            InputError: the file ends before `target` is full.
            FileError: the disk fails.
        """
        if self._stand_in is None:
            self._read_from(self._descriptor, offset, target)
        elif offset + len(target) <= self._stand_in.head:
            self._read_from(self._descriptor, self._stand_in.start + offset, target)
        else:
            self._read_arrived(offset, target)

    def _read_arrived(self, offset: int, target: memoryview) -> None:
        """Read from the whole file; it is opened for this read only, so that deleting it frees the disk at once."""
        stop = offset + len(target)
        noted = _noted.get()
        if noted is not None and stop <= self.size:
            noted.add(self.path)
            target[:] = bytes(len(target))
            return
        try:
            descriptor = os.open(self.path.parent / ARRIVED / self.path.name, _READ_FLAGS)
        except OSError as error:
            raise NotHere(self.path, stop) from error
        try:
            self._read_from(descriptor, offset, target)
        finally:
            os.close(descriptor)

    def _read_from(self, descriptor: int, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                count = self._read_once(descriptor, offset + done, target[done:])
            except OSError as error:
                raise FileError(f"{self.path} cannot be read: {error.strerror or error}.") from error
            if count == 0:
                raise InputError(
                    f"{self.path} ends at byte {offset + done} where byte {offset + len(target)} is needed.",
                    "It was cut off or changed since it was opened; download it again.",
                )
            done += count

    def _read_once(self, descriptor: int, offset: int, target: memoryview) -> int:
        """One system call; may return fewer bytes than asked for. 0 is the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [target], offset)
        if hasattr(os, "pread"):
            data = os.pread(descriptor, len(target), offset)
        else:
            # Windows has no positional read; the lock keeps seek and read of one thread together.
            with self._lock:
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(target))
        target[: len(data)] = data
        return len(data)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; the caller has checked `length` against `size`."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise InputError when size or modification time differ from those at opening."""
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise FileError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if (status.st_size, status.st_mtime_ns) != self._status:
            raise InputError(
                f"{self.path} changed while it was read.", "Run the command again when nothing writes to it."
            )

    @property
    def head_bytes(self) -> int:
        """How much of the file is in its stand-in; 0 when this is none."""
        return self._stand_in.head if self._stand_in else 0

    @property
    def is_stand_in(self) -> bool:
        """Whether it stands for a file on the hub."""
        return self._stand_in is not None

    @property
    def identity(self) -> str:
        """As the function of that name."""
        if self._stand_in is not None:
            return self._stand_in.identity
        return f"{self.path.resolve()} {self._status[0]} {self._status[1]}"

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def is_stand_in(path: Path) -> bool:
    """Whether a file stands for one on the hub.

    Raises:
        InputError, FileError: as `PositionalFile`.
    """
    file = PositionalFile(path)
    try:
        return file.is_stand_in
    finally:
        file.close()


def identity(path: Path) -> str:
    """What tells a file from any other: place, size and time; of a stand-in what it stands for.

    Raises:
        InputError, FileError: as `PositionalFile`.
    """
    file = PositionalFile(path)
    try:
        return file.identity
    finally:
        file.close()


def read_whole(path: Path, limit: int) -> bytes:
    """A small file's bytes.

    Args:
        limit: bytes; a bigger file is refused before anything is read.

    Raises:
        InputError: not a regular file, too big, or a Git LFS pointer.
        FileError: the file system refuses.
    """
    file = PositionalFile(path)
    try:
        if file.size > limit:
            raise InputError(f"{path} has {file.size} bytes; at most {limit} are expected of such a file.")
        data = file.read(0, file.size)
    finally:
        file.close()
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raise InputError when a file is Git LFS's placeholder instead of the file."""
    if head.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself.", "Run `git lfs pull` in that folder.")
