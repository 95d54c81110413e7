"""Outputs appear whole or not at all: partial file, lock, disk check, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import filelock
import platformdirs

from localmix.errors import CapacityError, FileError, LocalmixError, NetworkError, UsageError

# O_NOFOLLOW: a link in the place of a partial file must not lead the bytes elsewhere
_OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


# What stops a run without anything being wrong with the model.
RESUMABLE = (KeyboardInterrupt, NetworkError, CapacityError, FileError)


def file_error(error: OSError, path: Path, action: str) -> LocalmixError:
    """The sentence for an operating-system error while doing `action` (a verb: "write") to `path`."""
    if error.errno == errno.EFBIG:
        return CapacityError(
            f"{path} becomes larger than its file system allows; FAT32 allows 4 GiB.",
            "Choose another folder, or smaller files with `quantize --split-max-size 4GB`.",
        )
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return CapacityError(
            f"There is no space left to {action} {path}.",
            "Free some space, or choose another folder.",
        )
    return FileError(f"Cannot {action} {path}: {error.strerror or error}.")


class OutputFile:
    """A file of known size that is written at explicit offsets and appears under its name when it is complete.

    Use as a context manager and call `commit` at the end; without it nothing of the file remains. Only a kill
    leaves the partial file `.NAME.partial`, and when the run kept a journal, `.NAME.journal` says which of its
    slices are safely on the disk: the next run with the same fingerprint goes on from there.

    Args:
        path: the final name; an earlier file there stays untouched until `commit`.
        size: bytes of the finished file, reserved at once so that a full disk shows before the work; 0 when
            it is not known yet.
        fingerprint: identifies what is written; a partial file of another fingerprint is swept.
        resumable: leave the partial file and its journal after what `RESUMABLE` names, too: what was made of a
            download is dear.

    Attributes:
        done: numbers of the slices that an earlier, killed run already placed.

    Raises:
        FileError: the folder is missing or read-only, or another run writes the same output.
        CapacityError: the disk is too small.
    """

    def __init__(self, path: Path, size: int, fingerprint: str = "", *, resumable: bool = False) -> None:
        self.path = path
        self._resumable = resumable
        self.size = size
        self._fingerprint = fingerprint
        self._partial = path.with_name(f".{path.name}.partial")
        self._journal = path.with_name(f".{path.name}.journal")
        self._fresh_journal = path.with_name(f".{path.name}.journal.new")
        self._write_lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._finished = False
        self.done: frozenset[int] = frozenset()
        self._lock = lock_for(path)
        try:
            descriptor = self._resume()
            self._descriptor = self._create() if descriptor is None else descriptor
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise file_error(error, path, "write") from error
            raise

    def _resume(self) -> int | None:
        """Open what a killed run left of the very same output, or sweep it; the lock is held."""
        done = self._read_journal()
        if done:
            with contextlib.suppress(OSError):
                descriptor = os.open(self._partial, os.O_RDWR | _OPEN_FLAGS)
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and status.st_size == self.size:
                    self.done = done
                    return descriptor
                os.close(descriptor)
        self._sweep()
        return None

    def _sweep(self) -> None:
        for leftover in (self._fresh_journal, self._journal, self._partial):
            leftover.unlink(missing_ok=True)

    def _read_journal(self) -> frozenset[int]:
        if not self._fingerprint:
            return frozenset()
        try:
            journal = json.loads(self._journal.read_text("utf-8"))
            if journal["fingerprint"] != self._fingerprint:
                return frozenset()
            bitmap = int(journal["done"], 16)
        except (OSError, ValueError, TypeError, KeyError):
            return frozenset()  # none, or broken: then there is nothing to go on from
        return frozenset(slot for slot in range(bitmap.bit_length()) if bitmap >> slot & 1)

    def _create(self) -> int:
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o666)
        try:
            _reserve(descriptor, self.size)
        except BaseException:  # Ctrl-C too
            os.close(descriptor)
            self._partial.unlink()
            raise
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

    def keep(self, done: Iterable[int]) -> None:
        """Make what was written durable, then note in the journal that these slices need not be made again.

        Args:
            done: numbers of all slices whose bytes were written before this call.
        """
        bitmap = sum(1 << slot for slot in set(done))
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise file_error(error, self.path, "write") from error
        text = json.dumps({"fingerprint": self._fingerprint, "done": f"{bitmap:x}"})
        # a journal is a convenience: a disk that has no room for it has room for the output, which is reserved
        with self._journal_lock, contextlib.suppress(OSError):
            if self._finished:
                return
            self._fresh_journal.unlink(missing_ok=True)
            descriptor = os.open(self._fresh_journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(self._fresh_journal, self._journal)

    def settle(self) -> None:
        """Make the bytes durable and close the file: all that takes time before `commit`."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise file_error(error, self.path, "write") from error
        self._close()

    def commit(self) -> None:
        """Give the file its name."""
        if self._descriptor >= 0:
            self.settle()
        try:
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise file_error(error, self.path, "write") from error

    def _close(self) -> None:
        with self._journal_lock:  # a journal that is being written would come back after it was swept
            self._finished = True
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._resumable and isinstance(error, RESUMABLE) and self._read_journal():
            self._lock.release()
            return
        with contextlib.suppress(OSError):  # the first error, if there is one, is the one to tell
            self._sweep()
        self._lock.release()


def _reserve(descriptor: int, size: int) -> None:
    """Take the disk space of a file now rather than when it is full halfway."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
                raise
    os.truncate(descriptor, size)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that the name holds the old bytes or the new ones, never a part.

    Raises:
        FileError, CapacityError: as `OutputFile`.
    """
    with OutputFile(path, len(data)) as output:
        output.write(0, data)
        output.commit()


def check_outputs(
    outputs: Sequence[tuple[Path, int]], inputs: Iterable[Path], staged: Sequence[tuple[Path, int]] = ()
) -> None:
    """Refuse before any work: outputs that are an input, that collide, whose folder is missing, or that do not fit.

    Args:
        outputs: final paths with the bytes each will take.
        inputs: files that are read.
        staged: folders, with the bytes of other files that will be in each for a while.

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
            raise FileError(f"{path} is a folder, and the output is a file.", "Name a file.")
        name = folder.resolve() / path.name
        if name in seen:
            raise UsageError(f"Two outputs have the name {path}.", "Give each type a file of its own.")
        seen.add(name)
        for source in sources:
            if path.exists() and source.exists() and os.path.samefile(path, source):
                raise UsageError(
                    f"{path} is a file that is read; writing it would destroy it.",
                    "Choose another output.",
                )
        _check_kind(path)
        device = folder.stat().st_dev
        first, taken = needed.get(device, (folder, 0))
        needed[device] = first, taken + size - _already_taken(path)
    for folder, size in staged:
        device = folder.stat().st_dev
        first, taken = needed.get(device, (folder, 0))
        needed[device] = first, taken + size
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            from localmix.sizes import size as readable

            raise CapacityError(
                f"{folder} has {readable(free)} free, and the output takes {readable(size)}"
                f"{' with the shards on their way' if staged else ''}.",
                "Free some space, or choose another folder.",
            )


def _check_kind(path: Path) -> None:
    """Refuse to put a file in the place of something else: the rename would replace a device or a link itself."""
    if path.name == "-":
        raise UsageError("An output is a file: it is written in many places at once.", "Name a file.")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error(error, path, "write") from error
    if stat.S_ISLNK(mode):
        raise FileError(f"{path} is a symbolic link.", f"Name its target: {os.path.realpath(path)}.")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is no regular file.", "Name a file.")


def _already_taken(path: Path) -> int:
    """Bytes on the disk that a killed run left for this output: they are used again or freed."""
    try:
        return getattr(path.with_name(f".{path.name}.partial").lstat(), "st_blocks", 0) * 512
    except OSError:
        return 0


class TransientLock(filelock.FileLock):
    """A lock whose file goes away with it: thousands of outputs leave nothing behind.

    The file is removed while the lock is held. Who opened it before that gets a lock on a file without a name;
    filelock sees that, and opens the name anew.
    """

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # Windows removes no file that is open: there it stays
            os.unlink(self.lock_file)
        super()._release()


def lock_for(path: Path) -> filelock.BaseFileLock:
    """One writer for each output; the lock lies in the user's cache so that no file is left beside the output."""
    name = hashlib.sha256(os.fsencode(path.parent.resolve() / path.name)).hexdigest()[:32]
    for folder in (platformdirs.user_cache_path("localmix") / "locks", Path(tempfile.gettempdir()) / "localmix-locks"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = TransientLock(folder / name)
            # one that is just being released looks taken at first
            lock.acquire(timeout=0.2, poll_interval=0.02)
            return lock
        except filelock.Timeout:
            raise FileError(
                f"Another run is writing {path}.", "Wait for it to end, or choose another output."
            ) from None
        except OSError as error:
            refused = file_error(error, folder, "write")
    raise refused


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
