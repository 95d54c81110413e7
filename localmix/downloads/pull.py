"""pull: a model of the Hugging Face hub comes into the library, checked.

A checkpoint becomes the folder `<model>/<model>` of the library, so that every command finds it by its name; a GGUF
file becomes one of the model's types. What is there already, from an earlier run or a part of it, is not fetched
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from localmix import library
from localmix.downloads.download import Download, Progress, check_space, checksum_of, fetch_all
from localmix.downloads.hub import (
    HubFile,
    Repository,
    gguf_model,
    gguf_type,
    is_gguf,
    is_piece,
    look_up,
    parse_name,
    select,
)
from localmix.downloads.pull_record import Pulled, is_untouched, read_record, write_record
from localmix.errors import UsageError
from localmix.output import file_error, lock_for


@dataclass(frozen=True)
class PulledFile:
    """One file in its place; `fetched` is False where it was there already."""

    name: str
    path: Path
    bytes: int
    sha256: str
    fetched: bool


@dataclass(frozen=True)
class PulledModel:
    """What a run of `pull` leaves.

    Attributes:
        path: the checkpoint's folder, or the GGUF file (the first one of several).
        name: how the library calls it.
    """

    repository: str
    commit: str
    name: str
    path: Path
    files: tuple[PulledFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def pull(
    name: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    progress: Progress | None = None,
) -> PulledModel:
    """Fetch a checkpoint or GGUF files into the library.

    Args:
        name: `org/name`, or `org/name:TYPE` for one of its GGUF files.
        revision: a branch, tag or commit.
        include: patterns of the files that are meant; the checkpoint, or the only GGUF file, without them.
        progress: called with (bytes here, bytes in all, what is coming).

    Raises:
        UsageError: the name or the choice means nothing, or the library has another model of that name.
        NetworkError: see `hub` and `download`.
        InputError: there is nothing that can be used, or a file's name leads out of the folder.
        CapacityError, FileError: the disk is full or refuses.
    """
    parsed = parse_name(name)
    if parsed is None:
        raise UsageError(f"{name!r} is no name of a repository.", "Such as mistralai/Mixtral-8x7B-v0.1.")
    if parsed[1] and include:
        raise UsageError(f"{name} names a type, and --include names files.", "Give one of them.")
    repository = look_up(parsed[0], revision)
    places = place(repository, select(repository, include, parsed[1]))
    folders = list(dict.fromkeys(found.folder for found in places))
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_made(folder))
            stack.callback(lock_for(folder).release)
        files = _fill(repository, places, progress)
    first = places[0]
    path = first.folder if first.of_checkpoint else places[0].path
    if first.of_checkpoint:
        library.remember_checkpoint(first.folder)
    else:
        library.remember(sorted({found.path for found in places}))
    return PulledModel(repository.name, repository.commit, first.model, path, tuple(files))


@dataclass(frozen=True)
class Place:
    """Where a file of a repository goes: `folder` has the record, `inside` is the path in it."""

    file: HubFile
    model: str
    folder: Path
    inside: str
    of_checkpoint: bool

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.inside


def place(repository: Repository, files: Sequence[HubFile]) -> list[Place]:
    """Where the library has the files of a repository.

    Raises:
        UsageError: the library holds another model of that name.
    """
    places = []
    model = library.clean_name(repository.model)
    for file in files:
        if is_gguf(file.name):
            places.append(_place_gguf(repository, file))
        else:
            places.append(Place(file, model, library.pulled_folder(model), file.name, True))
    if any(found.of_checkpoint for found in places):
        library.check_repository(model, repository.name)
    seen: set[str] = set()
    for found in places:
        folded = str(found.path).casefold()  # file systems of macOS and Windows tell no case
        if folded in seen:
            raise UsageError(
                f"Two files of {repository.name} would become {found.path.name}.", "Choose one with --include."
            )
        seen.add(folded)
        if not found.of_checkpoint and found.path.exists():
            pulled = read_record(found.folder).get(found.inside)
            if pulled is None or (pulled.repository != repository.name and pulled.checksum != found.file.checksum):
                origin = "did not come from the hub" if pulled is None else f"came from {pulled.repository}"
                raise UsageError(
                    f"The library has {found.path.name} already, and it {origin}.",
                    f"Remove it with `localmix rm {found.model}:{library.split_name(found.path)[1]}`.",
                )
    # config.json decides what a folder is: a model of GGUF files is named by them
    return sorted(places, key=lambda found: not found.of_checkpoint)


def _place_gguf(repository: Repository, file: HubFile) -> Place:
    model, kind = gguf_model(repository, file.name), gguf_type(file.name)
    if is_piece(file.name):
        raise UsageError(
            f"{file.name} of {repository.name} is a piece of a file that was cut, and nothing loads pieces.",
            f"`localmix convert {repository.name}:{kind}` fetches and joins them.",
        )
    part = library.part_suffix(file.name)
    return Place(file, model, library.home() / model, f"{model}-{kind}{part}.gguf", False)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, for as long as it is filled: when that fails before anything came, it is not there afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, folder, "make") from error
    try:
        yield
    finally:
        for empty in (folder, folder.parent):
            if library.home() in empty.parents:
                with contextlib.suppress(OSError):  # it has files
                    empty.rmdir()


def _fill(repository: Repository, places: Sequence[Place], progress: Progress | None) -> list[PulledFile]:
    """Fetch what is not there, and note what is."""
    results: dict[Path, PulledFile] = {}
    missing: dict[Path, Place] = {}

    def note(found: Place, sha256: str, fetched: bool) -> None:
        note_pulled(repository, found, sha256)
        file = found.file
        results[found.path] = PulledFile(file.name, found.path, file.bytes, sha256, fetched)

    for found in places:
        _stay_inside(found)
        sha256 = known_sha256(found)
        if sha256:
            note(found, sha256, False)
        else:
            missing[found.path] = found
    for folder in {found.folder for found in places if found.of_checkpoint}:
        _delete_what_is_gone(repository, folder)
    downloads = [Download(found.file, found.path) for found in missing.values()]
    if downloads:
        check_space(downloads, places[0].folder)
        fetch_all(
            repository,
            downloads,
            progress=progress,
            finished=lambda download, sha256: note(missing[download.path], sha256, True),
        )
    return [results[found.path] for found in places]


def _delete_what_is_gone(repository: Repository, folder: Path) -> None:
    """Delete files of an earlier commit that the repository no longer has: a chat template would go on to count."""
    there = {file.name for file in repository.files}
    record = read_record(folder)
    gone = {inside for inside, pulled in record.items() if pulled.name not in there}
    for inside in gone:
        if is_untouched(folder, inside, record[inside]):
            (folder / inside).unlink()
    if gone:
        write_record(folder, {inside: pulled for inside, pulled in record.items() if inside not in gone})


def note_pulled(repository: Repository, found: Place, sha256: str) -> None:
    """Note that a file is in its place and was checked."""
    file = found.file
    record = read_record(found.folder)
    modified = found.path.stat().st_mtime_ns
    pulled = Pulled(repository.name, repository.commit, file.name, file.bytes, file.checksum, sha256, modified)
    if record.get(found.inside) != pulled:
        write_record(found.folder, {**record, found.inside: pulled})


def known_sha256(found: Place) -> str:
    """The SHA-256 of a file that is there and is the one that the hub has; else empty."""
    pulled = read_record(found.folder).get(found.inside)
    if (
        pulled is not None
        and pulled.checksum == found.file.checksum
        and is_untouched(found.folder, found.inside, pulled)
    ):
        return pulled.sha256
    try:
        if found.path.stat().st_size != found.file.bytes:
            return ""
    except FileNotFoundError:
        return ""
    right, sha256 = checksum_of(found.path, found.file)
    return sha256 if right else ""


def _stay_inside(found: Place) -> None:
    """Refuse a place that a link inside the folder leads out of."""
    folder = found.path.parent
    while not folder.exists():
        folder = folder.parent
    inside = folder.resolve()
    root = found.folder.resolve()
    if inside != root and root not in inside.parents and inside not in root.parents:
        raise UsageError(f"{folder} leads out of {found.folder}.", "Remove the link by hand.")
