"""What a model argument means where it may name a model of the hub: its heads, or its files as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix import library

if TYPE_CHECKING:
    from localmix.cli.console import Console
    from localmix.downloads.arrivals import ArrivingModel
    from localmix.downloads.hub import HubFile
    from localmix.sources.adapter import Lora
    from localmix.sources.remote import Remote


@dataclass(frozen=True)
class Located:
    """A model that can be opened.

    Attributes:
        name: what the user is told: the path, or the repository's name.
        files: those of the hub that hold weights; empty for a model that is here.
        download_bytes: what fetching it would be; None for a model that is here.
    """

    path: Path
    name: str
    files: tuple[HubFile, ...] = ()
    download_bytes: int | None = None


@contextmanager
def located(console: Console, wanted: str | None, *purposes: library.Purpose) -> Iterator[Located]:
    """The model that is meant, for as long as the block runs.

    Args:
        wanted: a path, a library name, a repository of the hub, or None for the model used last.
        purposes: of `library.resolve`; the next one where a model has nothing for one.

    Raises:
        LocalmixError: see `library.resolve` and `sources.remote`.
    """
    from localmix.errors import InputError, LocalmixError

    if wanted is not None and library.find_repository(wanted):
        from localmix.sizes import size
        from localmix.sources.remote import find_remote, heads

        console.status(f"Reading the heads of the files of {wanted} …")
        remote = find_remote(wanted, for_quantizing=library.Purpose.SOURCE in purposes)
        with heads(remote) as found:
            console.status()
            count = len(found.remote.weights)
            console.note(
                f"{wanted} is on the hub: {size(found.bytes)}, {count} file{'s' if count > 1 else ''} of weights."
            )
            try:
                yield Located(found.path, wanted, found.remote.weights, found.bytes)
            except LocalmixError as error:  # the folder of the heads means nothing to the user
                raise type(error)(error.message.replace(str(found.path), wanted), error.hint) from error
        return
    for purpose in purposes[:-1]:
        try:
            path = library.resolve(wanted, purpose)
        except InputError:
            continue
        yield Located(path, str(path))
        return
    path = library.resolve(wanted, purposes[-1])
    yield Located(path, str(path))


def find_model_of_hub(wanted: str | None) -> Remote | None:
    """The model of the hub that is to be read while it comes; None when the argument means something here.

    Raises:
        LocalmixError: see `sources.remote.find_remote`.
    """
    if wanted is None or not library.find_repository(wanted):
        return None
    from localmix.sources.remote import find_remote

    return find_remote(wanted, for_quantizing=True)


def adapted(source: Path, loras: Sequence[Lora]) -> Path:
    """The path by which the library names a model: its own, or MODEL+ADAPTER when adapters are merged into it."""
    if not loras:
        return source
    names = [library.clean_name(lora.path.resolve().name) for lora in loras]
    return source.with_name("+".join([library.model_name(source), *names]))


@contextmanager
def arriving_model(console: Console, remote: Remote, folder: Path, keep: bool) -> Iterator[ArrivingModel]:
    """`arrivals.arriving`, with words for the wait and for a Ctrl-C."""
    from localmix.downloads.arrivals import arriving
    from localmix.errors import Interrupted

    console.status(f"Reading the heads of the files of {remote.repository.name} …")
    try:
        with arriving(remote, folder, keep=keep) as coming:
            console.status()
            yield coming
    except KeyboardInterrupt as stopped:
        raise Interrupted(
            f"Stopped; what is done stays in {folder}.", "The same command goes on from there."
        ) from stopped
    finally:
        console.status()
