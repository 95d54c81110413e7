"""Read and write a file at given places from many threads, on systems with and without `pread`."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from localmix.errors import FileError, InputError

_HAS_PREAD = hasattr(os, "pread")  # Windows has none


class PositionalFile:
    """An open regular file that is read (and, for outputs, written) at explicit offsets.

    Args:
        path: for messages; the file itself when `descriptor` is not given.
        descriptor: an already open file, taken over and closed by this object.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        if descriptor is None:
            descriptor = _open_regular(path)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._opened_as = self._identity()

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._opened_as[0]

    def descriptor(self) -> int:
        """The file descriptor, for `fsync` and the like."""
        return self._descriptor

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset`.

        Raises:
            InputError: the file ends before, so it was cut since it was opened.
        """
        pieces: list[bytes] = []
        while count > 0:
            piece = self._read_some(offset, count)
            if not piece:
                raise InputError(
                    f"{self.path} ends at byte {offset:,}, inside a tensor: it was cut while it was read.",
                    "Check the file and start again.",
                )
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_some(self, offset: int, count: int) -> bytes:
        if _HAS_PREAD:
            return os.pread(self._descriptor, count, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, count)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """All of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        while rest:
            written = self._write_some(offset, rest)
            rest = rest[written:]
            offset += written

    def _write_some(self, offset: int, data: memoryview) -> int:
        if _HAS_PREAD:
            return os.pwrite(self._descriptor, data, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data)

    def check_unchanged(self) -> None:
        """Refuse to go on when somebody wrote to the file since it was opened.

        Raises:
            InputError: size or modification time differ.
        """
        if self._identity() != self._opened_as:
            raise InputError(
                f"{self.path} changed while it was read.", "Start again when nothing writes to it."
            )

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_regular(path: Path) -> int:
    """Open for reading, refusing pipes and devices, which would block or never end."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would hang for ever
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file.", "Give a file with weights.")
    return descriptor
