"""Outputs appear whole or not at all: partial file, lock, disk check, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import filelock
import platformdirs
import psutil

from localmix.errors import CapacityError, FileError, LocalmixError, UsageError

_PARTIAL_NAME = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.partial$")


def file_error(error: OSError, path: Path, action: str) -> LocalmixError:
    """The sentence for an operating-system error while doing `action` (a verb: "write") to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            f"There is no space left to {action} {path}.",
            "Free some space, or choose another folder with -o.",
        )
    return FileError(f"Cannot {action} {path}: {error.strerror or error}.")


class OutputFile:
    """A file of known size that is written at explicit offsets and appears under its name when it is complete.

    Use as a context manager and call `commit` at the end; without it nothing of the file remains.

    Args:
        path: the final name; an earlier file there stays untouched until `commit`.
        size: bytes of the finished file, reserved at once so that a full disk shows before the work.

    Raises:
        FileError: the folder is missing or read-only, or another run writes the same output.
        CapacityError: the disk is too small.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._write_lock = threading.Lock()
        self._lock = _lock_for(path)
        try:
            _sweep_partials(path)
            self._descriptor = self._create()
        except BaseException:
            self._lock.release()
            raise

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(self._partial, flags, 0o666)
        except OSError as error:
            raise file_error(error, self.path, "write") from error
        try:
            if hasattr(os, "posix_fallocate") and self.size:
                os.posix_fallocate(descriptor, 0, self.size)
            else:
                os.truncate(descriptor, self.size)
        except OSError as error:
            os.close(descriptor)
            self._partial.unlink()
            raise file_error(error, self.path, "write") from error
        return descriptor

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Place bytes; safe from several threads."""
        rest = memoryview(data)
        try:
            while rest:
                written = self._write_once(offset, rest)
                offset += written
                rest = rest[written:]
        except OSError as error:
            raise file_error(error, self.path, "write") from error

    def _write_once(self, offset: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, offset)
        # Windows has no positional write; the lock keeps seek and write of one thread together.
        with self._write_lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        try:
            os.fsync(self._descriptor)
            self._close()
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise file_error(error, self.path, "write") from error

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._partial.unlink(missing_ok=True)
        self._lock.release()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that the name holds the old bytes or the new ones, never a part.

    Raises:
        FileError, CapacityError: as `OutputFile`.
    """
    with OutputFile(path, len(data)) as output:
        output.write(0, data)
        output.commit()


def check_outputs(outputs: Sequence[tuple[Path, int]], inputs: Iterable[Path]) -> None:
    """Refuse before any work: outputs that are an input, that collide, whose folder is missing, or that do not fit.

    Args:
        outputs: final paths with the bytes each will take.
        inputs: files that are read.

    Raises:
        UsageError: an output is one of the inputs (by path, symlink or hard link) or given twice.
        FileError: a folder is missing or an output is a folder.
        CapacityError: less free space than the outputs take together.
    """
    sources = list(inputs)
    seen: set[Path] = set()
    needed: dict[int, tuple[Path, int]] = {}
    for path, size in outputs:
        folder = path.parent
        if not folder.is_dir():
            raise FileError(f"The folder {folder} does not exist.", f"Make it with `mkdir -p {folder}`.")
        if path.is_dir():
            raise FileError(f"{path} is a folder, and the output is a file.", "Name a file with -o.")
        if path.resolve() in seen:
            raise UsageError(f"Two outputs have the name {path}.", "Give each type a file of its own.")
        seen.add(path.resolve())
        for source in sources:
            if path.exists() and source.exists() and os.path.samefile(path, source):
                raise UsageError(
                    f"{path} is the model that is read; writing it would destroy it.",
                    "Choose another output with -o.",
                )
        device = folder.stat().st_dev
        needed[device] = folder, needed.get(device, (folder, 0))[1] + size
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise CapacityError(
                f"{folder} has {free / 2**30:.2f} GiB free, and the output takes {size / 2**30:.2f} GiB.",
                "Free some space, or choose another folder with -o.",
            )


def _lock_for(path: Path) -> filelock.BaseFileLock:
    """One writer for each output; the lock lies in the user's cache so that no file is left beside the output."""
    folder = platformdirs.user_cache_path("localmix") / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        lock = filelock.FileLock(folder / name)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FileError(
            f"Another run is writing {path}.", "Wait for it to end, or choose another output with -o."
        ) from None
    except OSError as error:
        raise file_error(error, folder, "write") from error
    return lock


def _sweep_partials(path: Path) -> None:
    """Remove what killed runs left for this output; the lock is held, so a living writer is another machine's."""
    try:
        siblings = list(path.parent.iterdir())
    except OSError as error:
        raise file_error(error, path, "write") from error
    for sibling in siblings:
        match = _PARTIAL_NAME.match(sibling.name)
        if match and match["name"] == path.name and not psutil.pid_exists(int(match["pid"])):
            with contextlib.suppress(OSError):
                sibling.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
