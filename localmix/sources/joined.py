"""A GGUF file in pieces that `cat` would join, read across them without a joined copy.

Hosts with a limit on file sizes made people cut files with `split`: `model.gguf-split-a` and `-b`,
`model.gguf.part1of2`, `model.gguf.aa`. llama.cpp reads none of them; its own parts (`-00001-of-00002.gguf`) are
something else, GGUF files each.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from localmix.errors import FileError, InputError
from localmix.sources.documents import listed
from localmix.sources.positional import PositionalFile

# Without a word before it only what `split` writes by itself is a piece: `.gguf.xz` is none.
_PIECE = re.compile(
    r"(?P<whole>.+\.gguf)"
    r"(?P<lead>[.-](?:split|part)[.-]?(?=[a-z]{1,2}$|\d)|[.-](?=[a-z]$|a[a-z]$|\d))"
    r"(?P<place>[a-z]{1,2}|\d{1,5})"
    r"(?P<of>[.-]?of[.-]?(?P<count>\d{1,5}))?",
    re.IGNORECASE,
)

_MOST_PIECES = 1000


def whole_name(name: str) -> str:
    """The name that a file has when its pieces are joined; of another file its own."""
    match = _PIECE.fullmatch(name)
    return match["whole"] if match else name


def find_pieces(path: Path) -> list[Path]:
    """All pieces of the file that one of them belongs to, in order; empty for a file that is no piece.

    Raises:
        InputError: pieces are missing; they are named.
        FileError: the folder cannot be read.
    """
    if whole_name(path.name) == path.name:
        return []
    try:
        names = os.listdir(path.parent)
    except OSError as error:
        raise FileError(f"{path.parent} cannot be read: {error.strerror or error}.") from error
    found, missing = sort_pieces(path.name, names)
    if missing:
        raise InputError(
            f"{path.with_name(whole_name(path.name))} lies in pieces, and these are missing: {listed(missing)}.",
            "Put them into the same folder.",
        )
    return [path.with_name(name) for name in found]


def sort_pieces(name: str, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The pieces among `names` that belong to the piece `name`, in order, and the names that are missing.

    Raises:
        InputError: there would have to be more than any model has.
    """
    given = _PIECE.fullmatch(name)
    assert given is not None
    found: dict[int, str] = {}
    for match in filter(None, map(_PIECE.fullmatch, names)):
        same = all(match[part] == given[part] for part in ("whole", "lead", "of"))
        if same and match["place"].isdigit() == given["place"].isdigit() and _same_width(match, given):
            found[_number(match["place"])] = match.string
    first = 0 if 0 in found or not given["place"].isdigit() else 1
    last = first + int(given["count"]) - 1 if given["count"] else max(found, default=_number(given["place"]))
    if last - first >= _MOST_PIECES:
        raise InputError(f"{name} says that it is one of more than {_MOST_PIECES} pieces, which no model has.")
    numbers = range(first, last + 1)
    missing = [_piece_name(given, number) for number in numbers if number not in found]
    return [found[number] for number in numbers if number in found], missing


def next_piece(path: Path, step: int = 1) -> str:
    """The name that the piece after this one, or `step` after it, would have."""
    match = _PIECE.fullmatch(path.name)
    assert match is not None
    return _piece_name(match, max(0, _number(match["place"]) + step))


def _same_width(match: re.Match[str], given: re.Match[str]) -> bool:
    """Letters and padded numbers are of one length throughout; `part9` is followed by `part10`."""
    padded = any(len(found["place"]) > 1 and found["place"][0] == "0" for found in (match, given))
    loose = given["place"].isdigit() and not padded
    return loose or len(match["place"]) == len(given["place"])


def _number(place: str) -> int:
    if place.isdigit():
        return int(place)
    number = 0
    for letter in place.lower():
        number = number * 26 + ord(letter) - ord("a")
    return number


def _piece_name(match: re.Match[str], number: int) -> str:
    place = match["place"]
    if place.isdigit():
        padded = len(place) if place[0] == "0" or len(place) > len(str(number)) else 1
        text = f"{number:0{padded}d}"
    else:
        letters = ""
        for _ in place:
            number, letter = divmod(number, 26)
            letters = chr(ord("a") + letter) + letters
        text = letters if place.islower() else letters.upper()
    return f"{match['whole']}{match['lead']}{text}{match['of'] or ''}"


class JoinedFile:
    """Several files read as one; has what is used of a `PositionalFile`.

    Args:
        paths: the pieces in order.

    Attributes:
        path: where the joined file would be, for messages.
        size: bytes of all pieces together.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.path = paths[0].with_name(whole_name(paths[0].name))
        self._pieces: list[PositionalFile] = []
        try:
            for path in paths:
                self._pieces.append(PositionalFile(path))
        except BaseException:
            self.close()
            raise
        ends = list(itertools.accumulate(piece.size for piece in self._pieces))
        self._starts = [0, *ends[:-1]]
        self.size = ends[-1]

    @property
    def paths(self) -> list[Path]:
        """The pieces."""
        return [piece.path for piece in self._pieces]

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes, contiguous) from `offset` on.

        Raises:
            InputError: the pieces end before `target` is full.
            FileError: the disk fails.
        """
        if offset + len(target) > self.size:
            raise InputError(
                f"{self.path} ends at byte {self.size} where byte {offset + len(target)} is needed.",
                f"Is {next_piece(self._pieces[-1].path)} missing?",
            )
        for piece, start in zip(self._pieces, self._starts, strict=True):
            first, last = max(offset, start), min(offset + len(target), start + piece.size)
            if first < last:
                piece.read_into(first - start, target[first - offset : last - offset])

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise InputError when a piece was written to since it was opened."""
        for piece in self._pieces:
            piece.check_unchanged()

    def close(self) -> None:
        """Close all pieces; a second call does nothing."""
        for piece in self._pieces:
            piece.close()
