"""verify: whether the files of a model are whole, are those that were published, and hold numbers only.

Structure and sizes come from heads and cost nothing. Checksums are compared with what `pull` noted, with a list
`SHA256SUMS` beside the files, or with the hub. The deep check decodes every weight. All problems are told, not only
the first one.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.architectures import find_architecture
from localmix.downloads.pull_record import Pulled, read_record
from localmix.errors import FileError, InputError, LocalmixError, UsageError
from localmix.importance import load_importance
from localmix.library import IMATRIX_SUFFIX
from localmix.native.devices import default_threads
from localmix.native.kernels import dequantize_rows, is_valid
from localmix.sources.base import Source, TensorInfo
from localmix.sources.checkpoint import CONFIG, list_folder, open_checkpoint, open_shards
from localmix.sources.documents import read_object, shown
from localmix.sources.gguf import GGUFFile
from localmix.sources.joined import find_pieces
from localmix.sources.positional import read_whole
from localmix.sources.quantized import read_scheme
from localmix.sources.safetensors import WEIGHT_DTYPES, Shard, StoredTensor, open_shard
from localmix.tensor_types import BLOCKS, FLOAT_TYPES, TensorType, widen

Progress = Callable[[int, int, str], None]

SUMS = "SHA256SUMS"

_SUMS_LIMIT = 16 << 20
# `HEX  NAME` and `HEX *NAME` of sha256sum, `SHA256 (NAME) = HEX` of the BSDs
_SUM = re.compile(r"(?P<hex>[0-9a-fA-F]{64}) [ *](?P<name>.+)|SHA256 \((?P<tagged>.+)\) = (?P<digits>[0-9a-fA-F]{64})")

_BLOCK = 4 << 20
_SLICE_WEIGHTS = 1 << 20
_INTEGERS = (TensorType.I8, TensorType.I16, TensorType.I32, TensorType.I64)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file, in one sentence that does not name it."""

    path: Path
    what: str


@dataclass(frozen=True)
class VerifiedFile:
    """One file.

    Attributes:
        sha256: of its content, when there was something to compare it with.
        compared: what it was compared with; empty when nothing says what it should be.
    """

    path: Path
    bytes: int
    sha256: str | None
    compared: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        weights: values that the deep check decoded; 0 without it.
        problems: empty when everything is right.
        notes: what could not be checked, and why.
    """

    path: Path
    files: tuple[VerifiedFile, ...]
    tensors: int
    weights: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Expected:
    """What a file should be: its size where that is known, and a checksum, SHA-256 or git's of a blob."""

    path: Path
    size: int | None
    sha256: str
    blob: str
    origin: str


@dataclass(frozen=True)
class _Scan:
    """Weights to be looked at in slices; `find` gives the flat index and the value of the first one that is bad.

    Attributes:
        shape: for the place that is told.
        rows: how many there are, and what one of them takes in bytes.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    find: Callable[[int, int], tuple[int, str] | None]


def verify(
    path: Path,
    *,
    deep: bool = False,
    online: bool = False,
    repository: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a GGUF file, a checkpoint, or a folder of the library.

    Args:
        path: a file or a folder.
        deep: decode all weights and look for NaN and Inf.
        online: ask the hub for the checksums, for files that came from there.
        repository: ask the hub for those of this repository, as `org/name`.
        threads: defaults to the cores at hand.
        progress: called with (bytes done, bytes in all, name of the file or tensor).

    Raises:
        UsageError: the hub is to be asked, and no repository is known.
        NetworkError: the hub cannot be asked.
        InputError: there is no model at the path.
        FileError: the folder cannot be read.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    with ExitStack() as opened:
        found = _Contents(path, opened, problems, notes)
        expected = _expected(path, found.files, problems)
        if online or repository:
            expected += _from_hub(path, found.files, repository)
        scans = [scan for source in found.sources for scan in _scans_of_gguf(source)] if deep else []
        scans += [scan for shard in found.shards for scan in _scans_of_shard(shard)] if deep else []
        by_path: dict[Path, list[_Expected]] = {}
        for entry in expected:
            by_path.setdefault(entry.path, []).append(entry)
        total = sum(scan.rows * scan.row_bytes for scan in scans)
        total += sum(file.stat().st_size for file in found.files if file in by_path)
        work = _Work(threads or default_threads(), total, progress)
        files = tuple(_check_sums(found.files, by_path, work, problems))
        problems += _run_scans(scans, work)
    unknown = [file.path.name for file in files if not file.compared]
    if unknown:
        told = "the file" if len(files) == 1 else f"{len(unknown)} of {len(files)} files"
        notes.append(f"Nothing says which checksum {told} should have.")
    weights = sum(math.prod(scan.shape) for scan in scans)
    return Verification(path, files, found.tensors, weights, tuple(dict.fromkeys(problems)), tuple(notes))


class _Contents:
    """What lies at a path, opened as far as its structure is right.

    Attributes:
        files: all files with weights, and the documents of a checkpoint.
        sources: GGUF files.
        shards: of checkpoints.
    """

    def __init__(self, path: Path, opened: ExitStack, problems: list[Problem], notes: list[str]) -> None:
        self.files: list[Path] = []
        self.sources: list[GGUFFile] = []
        self.shards: list[Shard] = []
        self.tensors = 0
        self._opened = opened
        self._problems = problems
        self._notes = notes
        if not path.exists():
            raise FileError(f"There is no file or folder {path}.", "`localmix ls` shows the models of the library.")
        if path.is_dir():
            self._open_folder(path)
            inside = path / path.name
            if (inside / CONFIG).is_file():
                self._open_folder(inside)
        elif path.suffix == ".safetensors":
            self._open_shard(path)
        else:
            self._open_gguf(path)
        if not self.files:
            raise InputError(f"{path} holds no model.", "Give a GGUF file, a checkpoint, or a model of the library.")

    def _note_problem(self, path: Path, error: LocalmixError) -> None:
        self._problems.append(Problem(path, _without_path(error.message, path)))

    def _open_folder(self, path: Path) -> None:
        names = sorted(list_folder(path))
        seen: set[Path] = set()
        for name in names:
            file = path / name
            if file in seen or not file.is_file():
                continue
            if name.endswith(IMATRIX_SUFFIX):
                self._open_imatrix(file)
            elif name.endswith(".gguf") or _is_piece(file):
                seen.update(self._open_gguf(file))
        if CONFIG in names or any(name.endswith(".safetensors") for name in names):
            self._open_checkpoint(path, names)

    def _open_gguf(self, path: Path) -> Sequence[Path]:
        try:
            source = GGUFFile(path)
        except LocalmixError as error:
            self._note_problem(path, error)
            self.files.append(path)
            return [path]
        self._opened.callback(source.close)
        self.sources.append(source)
        self._notes += source.notes
        self.tensors += len(source.tensors)
        self.files += source.files()
        return source.files()

    def _open_imatrix(self, path: Path) -> None:
        self.files.append(path)
        try:
            load_importance(path)
        except LocalmixError as error:
            self._note_problem(path, error)

    def _open_shard(self, path: Path) -> bool:
        self.files.append(path)
        try:
            shard = open_shard(path)
        except LocalmixError as error:
            self._note_problem(path, error)
            return False
        self._opened.callback(shard.close)
        self.shards.append(shard)
        self.tensors += len(shard.tensors)
        return True

    def _open_checkpoint(self, path: Path, names: Sequence[str]) -> None:
        """The shards one by one, so that each broken one is told, and then what they are together."""
        whole = [self._open_shard(path / name) for name in names if name.endswith(".safetensors")]
        record = read_record(path)
        self.files += [path / name for name in names if name in record and not name.endswith(".safetensors")]
        if CONFIG not in names:
            return
        self.files += [path / CONFIG] if CONFIG not in record else []
        if not all(whole):
            return
        try:
            config = read_object(path / CONFIG)
            with ExitStack() as stack:
                open_shards(path, set(names), stack)
            try:
                read_scheme(config, path / CONFIG, find_architecture(config, path / CONFIG).packed)
            except InputError as error:  # not damaged: only not to be converted
                self._notes.append(f"Files and index are checked, not what they are together: {error.message}")
                return
            open_checkpoint(path).close()
        except LocalmixError as error:
            self._note_problem(path, error)


def _is_piece(path: Path) -> bool:
    """Whether a file is a piece of a GGUF file that was cut; missing ones are told when it is opened."""
    try:
        return bool(find_pieces(path))
    except InputError:
        return True


def _without_path(message: str, path: Path) -> str:
    """The sentence without the file's name in front, which is told beside it."""
    for start in (f"{path}: ", f"{path} "):
        if message.startswith(start):
            return message.removeprefix(start)
    return message


# --- checksums -------------------------------------------------------------------------------


def _expected(path: Path, files: list[Path], problems: list[Problem]) -> list[_Expected]:
    """What is known of the files here, from `pull` and from lists of checksums; in a folder it may name more files."""
    folders = list(dict.fromkeys([*([path] if path.is_dir() else []), *(file.parent for file in files)]))
    expected: list[_Expected] = []
    for folder in folders:
        entries = [_of_record(folder, place, pulled) for place, pulled in read_record(folder).items()]
        if (folder / SUMS).is_file():
            try:
                entries += _read_sums(folder)
            except LocalmixError as error:
                problems.append(Problem(folder / SUMS, _without_path(error.message, folder / SUMS)))
        for entry in entries:
            if entry.path in files:
                expected.append(entry)
            elif path.is_dir() and not entry.path.exists():
                problems.append(Problem(entry.path, f"is missing; {entry.origin} has it."))
            elif path.is_dir() and entry.path.is_file():
                files.append(entry.path)
                expected.append(entry)
    return expected


def _of_record(folder: Path, place: str, pulled: Pulled) -> _Expected:
    return _Expected(folder / place, pulled.bytes, pulled.sha256, "", pulled.repository)


def _read_sums(folder: Path) -> list[_Expected]:
    """The entries of a folder's list of checksums.

    Raises:
        InputError: it is none, or names files elsewhere.
    """
    path = folder / SUMS
    entries = []
    for number, line in enumerate(read_whole(path, _SUMS_LIMIT).decode("utf-8", "surrogateescape").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SUM.fullmatch(line)
        if match is None:
            raise InputError(f"{path}: line {number} is no checksum with a name.")
        name = match["name"] or match["tagged"]
        place = Path(name)
        if place.is_absolute() or ".." in place.parts or "\0" in name:
            raise InputError(f"{path}: line {number} names {shown(name)}, outside of the folder.")
        entries.append(_Expected(folder / place, None, (match["hex"] or match["digits"]).lower(), "", SUMS))
    return entries


def _from_hub(path: Path, files: Sequence[Path], repository: str | None) -> list[_Expected]:
    """What the hub says of the files, at the commit that they came from.

    Raises:
        UsageError: no repository is known.
        NetworkError: see `hub.look_up`.
    """
    from localmix.downloads.hub import look_up

    named: dict[tuple[str, str | None], dict[str, Path]] = {}
    for file in files:
        for folder in (file.parent, *((path,) if path.is_dir() else ())):
            pulled = read_record(folder).get(file.relative_to(folder).as_posix()) if folder in file.parents else None
            if pulled is not None:
                named.setdefault((repository or pulled.repository, None if repository else pulled.commit), {})[
                    pulled.name
                ] = file
                break
        else:
            if repository:
                named.setdefault((repository, None), {})[file.name] = file
    if not named:
        raise UsageError(f"Nothing of {path} came from the hub by `localmix pull`.", "Name it: --repo ORG/NAME.")
    expected = []
    for (name, commit), wanted in named.items():
        for entry in look_up(name, commit).files:
            local = wanted.get(entry.name)
            if local is not None:
                expected.append(_Expected(local, entry.bytes, entry.sha256, entry.blob, f"the hub's {name}"))
    return expected


class _Work:
    """Threads, and the progress of all that they do."""

    def __init__(self, threads: int, total: int, progress: Progress | None) -> None:
        self.threads = threads
        self.stopped = threading.Event()
        self._total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def advance(self, count: int, label: str) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, label)

    def run(self, tasks: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """The results as they come; a few tasks are taken ahead, and all stop at the first error or Ctrl-C."""
        todo = iter(tasks)
        waiting: set[Future[Any]] = set()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="verify") as pool:
            try:
                while True:
                    while len(waiting) < 2 * self.threads and (task := next(todo, None)) is not None:
                        waiting.add(pool.submit(task))
                    if not waiting:
                        return
                    finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _check_sums(
    files: Sequence[Path], expected: dict[Path, list[_Expected]], work: _Work, problems: list[Problem]
) -> Iterator[VerifiedFile]:
    """Compare sizes, then checksums of what has the right size."""
    results: dict[Path, VerifiedFile] = {}
    todo: list[Path] = []
    for file in dict.fromkeys(files):
        size = file.stat().st_size if file.exists() else 0
        results[file] = VerifiedFile(
            file, size, None, ", ".join(dict.fromkeys(e.origin for e in expected.get(file, ())))
        )
        wrong = [entry for entry in expected.get(file, ()) if entry.size not in (None, size)]
        problems += [Problem(file, f"has {size:,} bytes, and {e.origin} has {e.size:,}.") for e in wrong]
        if file in expected and not wrong:
            todo.append(file)
    for file, sha256, blob in work.run([_hashing(file, work) for file in todo]):
        results[file] = replace(results[file], sha256=sha256)
        for entry in expected[file]:
            if (entry.sha256 or entry.blob) != (sha256 if entry.sha256 else blob):
                digest = f"its sha256 is {sha256}" if entry.sha256 else f"its checksum is {blob}"
                wanted = entry.sha256 or entry.blob
                problems.append(Problem(file, f"is not the file that {entry.origin} has: {digest}, not {wanted}."))
    yield from results.values()


def _hashing(file: Path, work: _Work) -> Callable[[], tuple[Path, str, str]]:
    def task() -> tuple[Path, str, str]:
        sha256 = hashlib.sha256()
        try:
            git = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
            with file.open("rb") as opened:
                while not work.stopped.is_set() and (block := opened.read(_BLOCK)):
                    sha256.update(block)
                    git.update(block)
                    work.advance(len(block), file.name)
        except OSError as error:
            raise FileError(f"{file} cannot be read: {error.strerror}.") from error
        return file, sha256.hexdigest(), git.hexdigest()

    return task


# --- the weights -----------------------------------------------------------------------------


def _scans_of_gguf(source: GGUFFile) -> Iterator[_Scan]:
    for tensor in source.tensors:
        if tensor.type not in _INTEGERS:
            weights, size = BLOCKS[tensor.type]
            row_bytes = tensor.columns // weights * size
            yield _Scan(source.path, tensor.name, tensor.shape, tensor.rows, row_bytes, _finder_in_gguf(source, tensor))


def _finder_in_gguf(source: Source, tensor: TensorInfo) -> Callable[[int, int], tuple[int, str] | None]:
    def find(start: int, stop: int) -> tuple[int, str] | None:
        rows = source.read(tensor, start, stop)
        if tensor.type == TensorType.F64:
            return _first_bad(rows.view("<f8"), start * tensor.columns)
        if tensor.type in FLOAT_TYPES:
            return _first_bad_bits(rows, tensor.type, start * tensor.columns)
        bytes_of_rows = np.ascontiguousarray(rows)
        bad = _first_bad(dequantize_rows(tensor.type, bytes_of_rows, tensor.columns), start * tensor.columns)
        if bad is None and not is_valid(tensor.type, bytes_of_rows):
            return start * tensor.columns, "a block that is none"
        return bad

    return find


def _scans_of_shard(shard: Shard) -> Iterator[_Scan]:
    for tensor in shard.tensors.values():
        find = _finder_in_shard(tensor)
        if find is not None:
            bits = 8 if tensor.dtype.startswith("F8") else WEIGHT_DTYPES[tensor.dtype].itemsize * 8
            yield _Scan(shard.path, tensor.name, tensor.shape, math.prod(tensor.shape), bits // 8, find)


# The bytes of FP8 that are no numbers, without their sign: from here on.
_FP8_LIMITS = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}


def _finder_in_shard(tensor: StoredTensor) -> Callable[[int, int], tuple[int, str] | None] | None:
    """Looks at weights one by one, whatever the shape; None for what is no floating-point number."""
    limit = _FP8_LIMITS.get(tensor.dtype)
    if limit is None and tensor.dtype not in WEIGHT_DTYPES:
        return None
    kind = np.dtype(np.uint8) if limit is not None else WEIGHT_DTYPES[tensor.dtype]

    def find(start: int, stop: int) -> tuple[int, str] | None:
        values = np.empty(stop - start, kind)
        tensor.file.read_into(tensor.offset + start * kind.itemsize, values.view(np.uint8).data)
        if limit is not None:
            bad = (values & 0x7F) >= limit
            return (start + int(bad.argmax()), "a value that is no number") if bad.any() else None
        if tensor.dtype == "F64":
            return _first_bad(values, start)
        return _first_bad_bits(values, TensorType[tensor.dtype], start)

    return find


def _first_bad(values: npt.NDArray[Any], origin: int) -> tuple[int, str] | None:
    finite = np.isfinite(values).reshape(-1)
    if finite.all():
        return None
    place = int(finite.argmin())
    return origin + place, str(values.reshape(-1)[place])


def _first_bad_bits(values: npt.NDArray[Any], kind: TensorType, origin: int) -> tuple[int, str] | None:
    """By the bits of the exponent, which costs less than widening."""
    bits = values.reshape(-1).view(np.uint32 if kind == TensorType.F32 else np.uint16)
    exponent = bits.dtype.type({TensorType.F32: 0x7F800000, TensorType.BF16: 0x7F80, TensorType.F16: 0x7C00}[kind])
    bad = (bits & exponent) == exponent
    if not bad.any():
        return None
    place = int(bad.argmax())
    return origin + place, str(widen(values.reshape(-1)[place : place + 1], kind)[0])


def _run_scans(scans: Sequence[_Scan], work: _Work) -> list[Problem]:
    """The first bad weight of each tensor that has one; a file that cannot be read is a problem like any other."""
    first: dict[int, tuple[int, str]] = {}
    unread: dict[Path, str] = {}

    def slices() -> Iterator[Callable[[], tuple[int, tuple[int, str] | None]]]:
        for number, scan in enumerate(scans):
            step = max(1, _SLICE_WEIGHTS * scan.rows // max(1, math.prod(scan.shape)))
            for start in range(0, scan.rows, step):
                yield _scanning(number, scan, start, min(start + step, scan.rows), work, unread)

    for number, bad in work.run(slices()):
        if bad is not None:
            first[number] = min(bad, first.get(number, bad))
    found = [Problem(scans[n].path, _told(scans[n], place, value)) for n, (place, value) in sorted(first.items())]
    return found + [Problem(path, what) for path, what in unread.items()]


def _scanning(
    number: int, scan: _Scan, start: int, stop: int, work: _Work, unread: dict[Path, str]
) -> Callable[[], tuple[int, tuple[int, str] | None]]:
    def task() -> tuple[int, tuple[int, str] | None]:
        bad = None
        if scan.path not in unread:
            try:
                bad = scan.find(start, stop)
            except LocalmixError as error:
                unread[scan.path] = _without_path(error.message, scan.path)
        work.advance((stop - start) * scan.row_bytes, scan.name)
        return number, bad

    return task


def _told(scan: _Scan, place: int, value: str) -> str:
    at = ", ".join(str(int(index)) for index in np.unravel_index(place, scan.shape)) if scan.shape else "0"
    return f"{scan.name} holds {value} at [{at}]."
