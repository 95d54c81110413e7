"""Positional reads of a regular file: any offset, from any thread, without a shared file pointer.

The file is checked before it is opened (a FIFO or a device would block or answer without end) and its size
and modification time are remembered, so that a file that changes under a long run is noticed.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from localmix.errors import FileError, InputError

# What a repository holds in place of a big file when it was cloned without Git LFS.
LFS_POINTER = b"version https://git-lfs"


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
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        # A FIFO put there between the two checks must not block the open either.
        flags |= getattr(os, "O_NONBLOCK", 0)
        try:
            self._require_regular(os.stat(path))
            self._descriptor = os.open(path, flags)
            status = os.fstat(self._descriptor)
            self._require_regular(status)
        except OSError as error:
            self.close()
            raise FileError(f"{path} cannot be opened: {error.strerror or error}.") from error
        except InputError:
            self.close()
            raise
        self.size = status.st_size
        self._modified = status.st_mtime_ns

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
        done = 0
        while done < len(target):
            try:
                count = self._read_once(offset + done, target[done:])
            except OSError as error:
                raise FileError(f"{self.path} cannot be read: {error.strerror or error}.") from error
            if count == 0:
                raise InputError(
                    f"{self.path} ends at byte {offset + done} where byte {offset + len(target)} is needed.",
                    "It was cut off or changed since it was opened; download it again.",
                )
            done += count

    def _read_once(self, offset: int, target: memoryview) -> int:
        """One system call; may return fewer bytes than asked for. 0 is the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], offset)
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, len(target), offset)
        else:
            # Windows has no positional read; the lock keeps seek and read of one thread together.
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, len(target))
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
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise InputError(
                f"{self.path} changed while it was read.", "Run the command again when nothing writes to it."
            )

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


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
