"""Texts to measure on: found, read and checked, split into chunks of tokens.

The bytes go to the tokenizer as llama.cpp's tools feed them, so that numbers can be compared: one newline at
the very end is dropped, everything else stays, a byte order mark and CRLF line ends included (`notes` says
when they occur, because they cost tokens). Several files are joined by one newline.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.errors import FileError, InputError, UsageError
from localmix.measurement.known_corpora import KNOWN_CORPORA, fetch

# more text than a week of measuring reads, and still less than memory
MAX_BYTES = 1 << 30
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus: its name without folders, its size, and the SHA-256 of its bytes in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """The text of one or several files.

    Attributes:
        text: UTF-8, as it goes to the tokenizer.
        notes: sentences on what is unusual in it.
    """

    files: tuple[CorpusFile, ...]
    text: bytes
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file names, joined by `+`."""
        return "+".join(file.name for file in self.files)

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """The SHA-256 of its file; of several, that of theirs in hex, one after the other."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


def find_corpora(specs: Sequence[str | Path]) -> list[Corpus]:
    """Read several corpora, one for each file; names are distinct, and a file that is named twice counts once.

    Args:
        specs: of each a file, a folder (each text in it, by name), or a name of `KNOWN_CORPORA`; `./NAME` is
            a file of that name.

    Raises:
        UsageError: nothing is given.
        InputError: a file is no text, or a folder has none.
        FileError: a file cannot be read.
        NetworkError: a known corpus is not in the cache yet, and the hub does not give it.
    """
    if not specs:
        raise UsageError("No corpus is given.", "Name a file or a folder with --corpus.")
    found: dict[Path, Corpus] = {}
    for spec in specs:
        for path, corpus in _find(spec):
            found.setdefault(Path(os.path.realpath(path)), corpus)
    return _with_distinct_names(found)


def _find(spec: str | Path) -> Iterator[tuple[Path, Corpus]]:
    """What one spec means."""
    path = Path(spec)
    if spec in KNOWN_CORPORA:
        path, notes = fetch(str(spec))
        corpus = read_corpus([path])
        yield path, replace(corpus, notes=notes + corpus.notes)
    elif path.is_dir():
        yield from _find_in_folder(path)
    elif path.exists():
        yield path, read_corpus([path])
    else:
        raise FileError(f"{spec} does not exist.", f"Known by name are: {', '.join(KNOWN_CORPORA)}.")


def _find_in_folder(folder: Path) -> Iterator[tuple[Path, Corpus]]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise FileError(f"{folder} cannot be read: {error.strerror}.") from error
    texts: list[tuple[Path, Corpus]] = []
    left_out: list[str] = []
    for path in entries:
        if path.name.startswith("."):
            left_out.append(f"{path.name} (hidden)")
        elif not path.is_file():
            left_out.append(f"{path.name} ({'a folder' if path.is_dir() else 'no file'})")
        elif _has_zeros(path):
            left_out.append(f"{path.name} (binary)")
        else:
            try:
                texts.append((path, read_corpus([path])))
            except InputError as error:
                left_out.append(f"{path.name} ({error.message.removeprefix(f'{path} is ').rstrip('.')})")
    if not texts:
        inside = f" but {', '.join(left_out)}" if left_out else ""
        raise InputError(f"{folder} has no text in it{inside}.", "A corpus is a plain UTF-8 text.")
    if left_out:
        path, corpus = texts[0]
        note = f"Left out of {folder}: {', '.join(left_out)}."
        texts[0] = path, replace(corpus, notes=(note, *corpus.notes))
    yield from texts


def _has_zeros(path: Path) -> bool:
    """Whether the first bytes hold a zero, which no UTF-8 text does: weights are not read to their end for it."""
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(1 << 16)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error


def _with_distinct_names(found: Mapping[Path, Corpus]) -> list[Corpus]:
    """Corpora of one file each; those of the same name get their folder's in front, or their whole path."""
    names = {path: corpus.name for path, corpus in found.items()}
    for longer in (lambda path: f"{path.parent.name}/{path.name}", str):
        times = Counter(names.values())
        names = {path: name if times[name] == 1 else longer(path) for path, name in names.items()}
    return [replace(corpus, files=(replace(corpus.files[0], name=names[path]),)) for path, corpus in found.items()]


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """Read the files of a corpus.

    Raises:
        UsageError: no file is given.
        FileError: a file cannot be read.
        InputError: a file is empty, too large or not UTF-8, or a device.
    """
    if not paths:
        raise UsageError("No corpus file is given.", "Name one with --corpus FILE.")
    files, texts, notes = [], [], []
    for path in paths:
        data = _read(path)
        _check(path, data)
        if data.startswith(BYTE_ORDER_MARK):
            notes.append(f"{path.name} starts with a byte order mark, which is tokenized as text.")
        if b"\r\n" in data:
            notes.append(f"{path.name} has CRLF line ends, which are tokenized as they are.")
        files.append(CorpusFile(path.name, len(data), hashlib.sha256(data).hexdigest()))
        texts.append(data.removesuffix(b"\n"))
    return Corpus(tuple(files), b"\n".join(texts), tuple(notes))


def _read(path: Path) -> bytes:
    """The bytes of a file, or of a pipe that somebody writes to, such as a shell's `<(command)`."""
    try:
        # opening a pipe that nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            return _read_open(descriptor, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error


def _read_open(descriptor: int, path: Path) -> bytes:
    status = os.fstat(descriptor)
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        raise InputError(f"{path} is a device.", "A corpus is a plain text file.")
    data = bytearray()
    while max(status.st_size, len(data)) <= MAX_BYTES:
        try:
            piece = os.read(descriptor, 1 << 20)
        except BlockingIOError:  # somebody is about to write
            os.set_blocking(descriptor, True)
            continue
        if piece:
            data += piece
        elif stat.S_ISFIFO(status.st_mode) and not data:
            raise InputError(f"Nothing comes out of the pipe {path}.", "Start what writes into it first.")
        else:
            return bytes(data)
    raise InputError(f"{path} is larger than {MAX_BYTES / 2**30:g} GiB.", "Take a part of it.")


def _check(path: Path, data: bytes) -> None:
    if not data.strip():
        raise InputError(f"{path} is empty.", "A corpus is a plain text of some ten thousand words or more.")
    for mark, kind in OTHER_MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{path} is {kind}, not plain UTF-8 text.", "Convert or unpack it first.")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}.",
            "Convert it, for example with `iconv -t UTF-8`.",
        ) from error


def split(
    tokens: NDArray[np.int32], context: int, *, name: str, limit: int | None = None, bos: int | None = None
) -> NDArray[np.int32]:
    """Cut a token list into chunks that do not overlap; the rest at its end is left out.

    Args:
        tokens: of the whole corpus.
        context: tokens of a chunk.
        name: of the corpus, for the error.
        limit: take only so many chunks.
        bos: token that replaces the first of each chunk, or None.

    Returns:
        int32 `[chunks, context]`.

    Raises:
        UsageError: `context` or `limit` is too small.
        InputError: there are fewer than two chunks, llama.cpp's own limit.
    """
    if context < 8:
        raise UsageError(f"A context of {context} tokens is too small to measure; 8 is the least.")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} chunks cannot be measured; take 1 or more.")
    found, needed = len(tokens), 2 * context
    if found < needed:
        fitting = 1 << max(3, (found // 2).bit_length() - 1)
        shorter = f", or a context of {fitting}" if found >= 16 else ""
        raise InputError(
            f"{name} is too short: a context of {context} needs {needed} tokens, and it has {found}.",
            f"Take a longer text{shorter}.",
        )
    count = min(found // context, limit or found)
    chunks = np.array(tokens[: count * context]).reshape(count, context)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks
