"""Texts to measure on: read and checked, split into chunks of tokens.

The bytes go to the tokenizer as llama.cpp's tools feed them, so that numbers can be compared: one newline at
the very end is dropped, everything else stays, a byte order mark and CRLF line ends included (`notes` says
when they occur, because they cost tokens). Several files are joined by one newline.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.errors import FileError, InputError, UsageError

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
