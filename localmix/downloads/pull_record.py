"""What of a folder came from the hub: a small file `.hub.json` in it, so that nothing is fetched or hashed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RECORD = ".hub.json"


@dataclass(frozen=True)
class Pulled:
    """A file that came from the hub and was checked.

    Attributes:
        repository, commit, name: what it is there.
        bytes, checksum: as the hub said; the checksum is the one that `HubFile.checksum` has.
        sha256: of its content, in hex.
        modified: its modification time when it was checked, in nanoseconds.
    """

    repository: str
    commit: str
    name: str
    bytes: int
    checksum: str
    sha256: str
    modified: int


def read_record(folder: Path) -> dict[str, Pulled]:
    """By path inside the folder, with `/`: what came from the hub; empty where nothing did.

    A record may have come with a folder of somebody else's: a path that leads out of the folder is left out.
    """
    try:
        record: Any = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = {}
    for place, entry in record.items() if isinstance(record, Mapping) else ():
        try:
            pulled = Pulled(**entry)
        except TypeError:
            continue
        right = all(isinstance(value, kind) for value, kind in zip(asdict(pulled).values(), _KINDS, strict=True))
        if right and _stays_inside(place):
            found[place] = pulled
    return found


def _stays_inside(place: str) -> bool:
    windows = PureWindowsPath(place)  # what is a folder, a drive or a root to either system
    return not windows.anchor and not PurePosixPath(place).is_absolute() and ".." not in windows.parts


_KINDS = (str, str, str, int, str, str, int)


def write_record(folder: Path, record: Mapping[str, Pulled]) -> None:
    """Note what came from the hub.

    Raises:
        FileError, CapacityError: the folder cannot be written.
    """
    from localmix.output import write_atomically

    text = json.dumps({place: asdict(pulled) for place, pulled in sorted(record.items())}, indent=1)
    write_atomically(folder / RECORD, text.encode("ascii"))


def is_untouched(folder: Path, place: str, pulled: Pulled) -> bool:
    """Whether a file is still as it was when it came."""
    try:
        status = (folder / place).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (pulled.bytes, pulled.modified)
