"""Shards of a model of the hub that come while it is read, and go when nothing needs them any more.

The folder holds stand-ins and the small files, so that the model is planned in full before the first shard is
fetched. A shard is fetched beside them, checked, read, and deleted once what was made of it is safely on the disk:
never are more than `WINDOW` of them there. What a stopped run left is gone on from.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localmix import library
from localmix.downloads.download import Download, checksum_of, fetch, fetch_all, seed, short_name
from localmix.downloads.hub import TIMEOUT, HubFile, Repository, Stop, Stopped, gguf_model, gguf_type
from localmix.downloads.pull import Place, known_sha256, note_pulled, place, pull
from localmix.errors import FileError
from localmix.output import RESUMABLE, file_error, lock_for
from localmix.sources.positional import ARRIVED, read_head
from localmix.sources.remote import Remote, fetch_heads

# One shard is read while the next one comes.
WINDOW = 2


class Arrivals:
    """Whole files behind stand-ins; used by one thread, while others fetch.

    Args:
        repository: where they come from.
        files: stand-in → file of the hub.
        places: where files are kept; the others are deleted.
    """

    def __init__(
        self, repository: Repository, files: Mapping[Path, HubFile], places: Mapping[HubFile, Place] | None = None
    ) -> None:
        self._repository = repository
        self._files = files
        self._places = places or {}
        self._wanted: deque[Path] = deque()
        self._window = WINDOW
        self._change = threading.Condition()
        self._stop = Stop()
        self._taken: set[Path] = set()  # on the disk, or on their way
        self._here: dict[Path, str] = {}
        self._bytes: dict[Path, int] = {}
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    @property
    def staged(self) -> list[tuple[Path, int]]:
        """Folders, with the bytes that files on their way, or kept, still take in each."""
        taken = [(found.folder, file.bytes) for file, found in self._places.items() if not known_sha256(found)]
        if not self._places:
            largest = sum(sorted((file.bytes for file in self._files.values()), reverse=True)[:WINDOW])
            here = sum(path.stat().st_size for folder in self._folders for path in folder.iterdir())
            taken = [(self._folders[0], max(0, largest - here))]
        # what does not exist yet will be on the disk of the folder that does
        return [(next(path for path in (folder, *folder.parents) if path.is_dir()), size) for folder, size in taken]

    @property
    def _folders(self) -> list[Path]:
        """Where the whole files lie while they are here."""
        return sorted({path.parent / ARRIVED for path in self._files})

    @property
    def label(self) -> str:
        """What is coming, for people."""
        with self._change:
            coming = [path for path in self._taken if path not in self._here]
        if not coming:
            return "fetching"
        first = min(coming)
        return f"fetching {short_name(first.name)} {100 * self._bytes.get(first, 0) // self._files[first].bytes} %"

    def begin(self, wanted: Sequence[Path]) -> None:
        """Fetch files in this order; what an earlier run left of others is deleted."""
        first = [self._download(path) for path in wanted[:WINDOW]]
        of_use = {path for found in first for path in (found.path, found.partial, found.note)}
        for folder in self._folders:
            for path in folder.iterdir():
                if path not in of_use:
                    path.unlink()
        self._wanted.extend(wanted)
        for number in range(WINDOW):
            thread = threading.Thread(target=self._work, name=f"arrivals-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _download(self, path: Path) -> Download:
        return Download(self._files[path], path.parent / ARRIVED / path.name)

    def _work(self) -> None:
        try:
            while (path := self._next()) is not None:
                sha256 = self._bring(path)
                with self._change:
                    self._here[path] = sha256
                    self._change.notify_all()
        except Stopped:
            pass
        except BaseException as error:  # told by the thread that waits
            with self._change:
                self._error = self._error or error
                self._change.notify_all()

    def _next(self) -> Path | None:
        with self._change:
            while self._wanted and len(self._taken) >= self._window and not self._stop.is_set():
                self._change.wait()
            if not self._wanted or self._stop.is_set():
                return None
            path = self._wanted.popleft()
            self._taken.add(path)
            return path

    def _bring(self, path: Path) -> str:
        download = self._download(path)
        if download.path.exists():  # whole, of an earlier run: perhaps of an earlier commit
            right, sha256 = checksum_of(download.path, download.file)
            if right:
                return sha256
            download.path.unlink()
        seed(download, read_head(path))

        def watch(count: int) -> None:
            self._bytes[path] = count

        return fetch(self._repository, download, self._stop, watch)

    def are_here(self, paths: frozenset[Path]) -> bool:
        """Whether files can be read.

        Raises:
            LocalmixError: one does not come.
        """
        with self._change:
            if self._error is not None:
                raise self._error
            return paths <= self._here.keys()

    def wait(self, seconds: float) -> None:
        """Wait until something has come, or so long."""
        with self._change:
            if self._error is None:
                self._change.wait(seconds)

    def widen(self) -> None:
        """Let one more file be here if all that may be are, and still are not enough to go on with."""
        with self._change:
            if self._wanted and len(self._taken) == len(self._here) == self._window:
                self._window += 1
                self._change.notify_all()

    def release(self, path: Path) -> None:
        """Nothing needs a file any more."""
        arrived = path.parent / ARRIVED / path.name
        found = self._places.get(self._files[path])
        try:
            if found is None:
                arrived.unlink()
            else:
                found.path.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(arrived, found.path)
                note_pulled(self._repository, found, self._here[path])
        except OSError as error:
            raise file_error(error, arrived, "delete" if found is None else "keep") from error
        with self._change:
            del self._here[path]
            self._taken.discard(path)
            self._change.notify_all()

    def end(self) -> None:
        """Stop fetching."""
        self._stop.set()
        with self._change:
            self._change.notify_all()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT)


@dataclass(frozen=True)
class ArrivingModel:
    """A model of the hub that is read while it comes: `path` is what `open_source` opens."""

    path: Path
    arrivals: Arrivals


def arriving_name(remote: Remote) -> str:
    """How the library calls a model of the hub."""
    if remote.is_gguf:
        return gguf_model(remote.repository, remote.weights[0].name)
    return library.clean_name(remote.repository.model)


@contextmanager
def arriving(remote: Remote, folder: Path, *, keep: bool = False) -> Iterator[ArrivingModel]:
    """A model of the hub, to be read while it comes.

    Args:
        folder: where the outputs go; what comes takes its place on the same disk.
        keep: leave the model in the library, as `pull` does.

    Raises:
        NetworkError: a head or a small file does not come.
        UsageError: with `keep`: the library has another model of that name.
        FileError, CapacityError: the disk refuses or is full.
    """
    repository = remote.repository
    places = {found.file: found for found in place(repository, remote.weights)} if keep else {}
    own = folder / library.DOWNLOADS / repository.name.replace("/", "--")
    model = own / library.clean_name(repository.model)
    if not folder.is_dir():
        raise FileError(f"The folder {folder} does not exist.", f"Make it with `mkdir -p {folder}`.")
    lock = lock_for(own)
    try:
        try:
            (model / ARRIVED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, model, "make") from error
        weights = _lay_out(remote, model, places)
        arrivals = Arrivals(repository, weights, places)
        try:
            yield ArrivingModel(next(iter(weights)) if remote.is_gguf else model, arrivals)
        finally:
            arrivals.end()
        if keep:
            _keep_the_rest(remote)
    except RESUMABLE:
        if not any((model / ARRIVED).glob("*")):
            _sweep(own)
        raise
    except BaseException:
        _sweep(own)
        raise
    else:
        _sweep(own)
    finally:
        lock.release()


def _lay_out(remote: Remote, model: Path, places: Mapping[HubFile, Place]) -> dict[Path, HubFile]:
    """Put the small files and the stand-ins into a folder; by stand-in what it stands for."""
    stop = Stop()
    weights = {model / _base(file): file for file in remote.weights}
    documents = {model / file.name: file for file in remote.documents}
    for path in model.rglob("*"):  # an earlier commit may have had other files
        if path.is_file() and ARRIVED not in path.parts and path not in weights and path not in documents:
            path.unlink()
    wanted = []
    for path, file in weights.items():
        found = places.get(file)
        if found is not None and known_sha256(found):
            _link(found.path, path)  # kept by an earlier run
        else:
            wanted.append((file, path))
    fetch_heads(remote.repository, wanted, stop)
    missing = []
    for path, file in documents.items():
        if not path.exists() or not checksum_of(path, file)[0]:
            missing.append(Download(file, path))
    fetch_all(remote.repository, missing)
    return weights


def _link(target: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(target)
    except OSError:  # another disk
        path.symlink_to(target)


def _keep_the_rest(remote: Remote) -> None:
    """The small files, and shards that no tensor needed."""
    repository = remote.repository
    name = f"{repository.name}:{gguf_type(remote.weights[0].name)}" if remote.is_gguf else repository.name
    pull(name, revision=repository.commit)


def _base(file: HubFile) -> str:
    return file.name.rpartition("/")[2]


def _sweep(own: Path) -> None:
    shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(OSError):  # another model comes
        own.parent.rmdir()
