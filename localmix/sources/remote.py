"""Models on the hub as sources that can be planned: the heads of their files, and the small files whole.

A folder of stand-ins (see `positional`) is opened like any other model. What is read is bounded: 64 KiB of each
file, more where its head is longer, and the configuration and tokenizer.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localmix import library
from localmix.downloads.download import Download, fetch
from localmix.downloads.hub import (
    HubFile,
    Repository,
    Stop,
    gguf_type,
    is_gguf,
    look_up,
    parse_name,
    read_range,
    select,
    whole_file,
)
from localmix.errors import InputError, LocalmixError, NetworkError, UsageError
from localmix.sources.documents import DOCUMENT_LIMIT, listed
from localmix.sources.positional import NotHere, identity, write_stand_in

_FIRST_BYTES = 1 << 16
_HEAD_LIMIT = 128 << 20  # a safetensors header may have 32 MiB, a GGUF head with its vocabulary rarely 20
_CONNECTIONS = 8
_FOR_PEOPLE = ("README.md", "LICENSE")


@dataclass(frozen=True)
class Remote:
    """The files of a repository that make one model.

    Attributes:
        weights: in the order of their names.
        documents: configuration and tokenizer.
    """

    repository: Repository
    weights: tuple[HubFile, ...]
    documents: tuple[HubFile, ...]

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a GGUF file or the parts of one."""
        return bool(self.weights) and is_gguf(self.weights[0].name)


def find_remote(text: str, *, for_quantizing: bool = False) -> Remote:
    """The model that `org/name` or `org/name:TYPE` means.

    Args:
        for_quantizing: take the GGUF file in full precision where there are several and none is named.

    Raises:
        NetworkError, InputError, UsageError: see `hub.look_up` and `hub.select`.
    """
    parsed = parse_name(text)
    assert parsed is not None
    name, kind = parsed
    try:
        repository = look_up(name)
    except NetworkError as error:
        raise NetworkError(f"There is no file or folder {name} here. {error.message}", error.hint) from error
    if for_quantizing and not kind and not any(file.name.endswith(".safetensors") for file in repository.files):
        there = {gguf_type(file.name).upper() for file in repository.files if is_gguf(file.name)}
        kind = next((known for known in library.FLOAT_TYPES if known in there), "")
    files = [file for file in select(repository, kind=kind) if not file.name.startswith(_FOR_PEOPLE)]
    weights = tuple(sorted((file for file in files if is_weights(file)), key=lambda file: file.name))
    documents = tuple(file for file in files if not is_weights(file))
    ggufs = list(dict.fromkeys(whole_file(file.name) for file in weights if is_gguf(file.name)))
    if len(ggufs) > 1:
        raise UsageError(
            f"{name} has several GGUF files of type {gguf_type(ggufs[0])}: {listed(ggufs)}.",
            f"Fetch the one that you mean, such as with `localmix pull {name} --include '{ggufs[0]}'`.",
        )
    for file in documents:
        if file.bytes > DOCUMENT_LIMIT:
            raise InputError(f"{file.name} of {name} has {file.bytes:,} bytes; no such file is that big.")
    return Remote(repository, weights, documents)


def is_weights(file: HubFile) -> bool:
    """Whether a file has a head and weights."""
    return file.name.lower().endswith(".safetensors") or is_gguf(file.name)


@dataclass(frozen=True)
class Heads:
    """A model of the hub that can be planned: `path` is what `open_source` opens."""

    remote: Remote
    path: Path

    @property
    def bytes(self) -> int:
        """What a download of the model would be."""
        return sum(file.bytes for file in (*self.remote.weights, *self.remote.documents))


@contextmanager
def heads(remote: Remote) -> Iterator[Heads]:
    """The heads of a model of the hub, for as long as the block runs.

    Raises:
        NetworkError: a head does not come.
        FileError, CapacityError: the folder for temporary files refuses.
    """
    with tempfile.TemporaryDirectory(prefix="localmix-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / library.clean_name(remote.repository.model)
        folder.mkdir()
        stop = Stop()
        fetch_heads(remote.repository, [(file, folder / _base(file)) for file in remote.weights], stop)
        for file in remote.documents:
            fetch(remote.repository, Download(file, folder / file.name), stop)
        yield Heads(remote, folder / _base(remote.weights[0]) if remote.is_gguf else folder)


def _base(file: HubFile) -> str:
    return file.name.rpartition("/")[2]


def fetch_heads(repository: Repository, places: Sequence[tuple[HubFile, Path]], stop: Stop) -> None:
    """Put a stand-in into each place that has not the right one.

    Raises:
        NetworkError: a head does not come.
    """
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="heads") as pool:
        futures = [pool.submit(_fetch_head, repository, file, path, stop) for file, path in places]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch_head(repository: Repository, file: HubFile, path: Path, stop: Stop) -> None:
    told = f"{repository.name} {file.name} {file.checksum}"
    with contextlib.suppress(LocalmixError):
        if path.exists() and identity(path) == told and _missing_head(path) is None:
            return
    head = b""
    wanted: int | None = min(_FIRST_BYTES, file.bytes)
    while wanted is not None:
        head += read_range(repository, file, len(head), wanted, stop)
        if len(head) == file.bytes:
            _check_whole(file, head)
        write_stand_in(path, file.bytes, told, head)
        wanted = _missing_head(path)
        if wanted is not None:
            # a GGUF head does not say how long it is: twice as much each time
            wanted = min(file.bytes, max(wanted, 2 * len(head)))
            if wanted > _HEAD_LIMIT:
                raise InputError(f"The head of {file.name} of {repository.name} is too long to be one.")


def _missing_head(path: Path) -> int | None:
    """Bytes that the head must have at least, or None when it is whole, or broken: that is told by who opens it."""
    from localmix.gguf_format import read_header
    from localmix.sources.safetensors import open_shard

    try:
        if is_gguf(path.name):
            read_header(path)  # of the first piece where it was cut
        else:
            open_shard(path).close()
    except NotHere as error:
        return error.stop
    except InputError:
        return None
    return None


def _check_whole(file: HubFile, content: bytes) -> None:
    """A file that is all head is never fetched again, so it is checked here."""
    git = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    git.update(content)
    found = hashlib.sha256(content).hexdigest() if file.sha256 else git.hexdigest()
    if found != file.checksum:
        raise NetworkError(
            f"{file.name} came with the wrong content: its checksum is not {file.checksum}.",
            "Something on the way may change downloads. Try again, or without the mirror that HF_ENDPOINT may name.",
        )
