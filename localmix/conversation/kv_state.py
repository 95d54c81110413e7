"""Files that hold a KV cache, so that a conversation goes on without its text being read again.

A file is what llama.cpp writes for one sequence, and behind it a footer: JSON with the key, the bytes and the
SHA-256 of what stands before, then its length and a magic number. llama.cpp trusts such a file, so everything is
checked before it sees one. The key says what the numbers depend on (model, types, template, engine): a cache of
something else is worth nothing, and is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from localmix.errors import FileError

MAGIC = b"localmix-kv-1\n"
_FOOTER_LIMIT = 65536
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StateFile:
    """A sound state file.

    Attributes:
        tokens: how many tokens' keys and values it holds.
        bytes: its size.
    """

    tokens: int
    bytes: int


def write_state(path: Path, key: Mapping[str, object], tokens: int, save: Callable[[Path], None]) -> StateFile:
    """Write a state file; its name holds the old one until the new one is whole.

    Args:
        key: what the cache depends on; must come back from JSON as it is.
        tokens: how many tokens the cache holds.
        save: writes the cache itself into the file of that name.

    Raises:
        FileError, CapacityError: the file cannot be written.
        Whatever `save` raises.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        # the tokens are what was said: for the user's eyes only
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600))
        try:
            save(partial)
            with partial.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                facts = {"key": dict(key), "tokens": tokens, "bytes": size, "sha256": _digest(file, size)}
                footer = json.dumps(facts).encode()
                file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
                total = file.tell()
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        from localmix.output import file_error

        raise file_error(error, path, "write") from error
    return StateFile(tokens, total)


def read_state(path: Path, key: Mapping[str, object]) -> StateFile | None:
    """Check a state file from its end to its start; None if it is missing, damaged or has another key."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        end = total - len(MAGIC) - 8
        file.seek(max(end, 0))
        length = int.from_bytes(file.read(8), "little")
        if file.read() != MAGIC or not 0 < length <= min(_FOOTER_LIMIT, end):
            return None
        file.seek(end - length)
        facts = json.loads(file.read(length))
        if facts["key"] != dict(key) or facts["bytes"] != end - length:
            return None
        file.seek(0)
        if facts["sha256"] == _digest(file, end - length):
            return StateFile(int(facts["tokens"]), total)
    return None


def model_identity(path: Path) -> dict[str, object]:
    """What tells a model file from others without reading it all.

    Raises:
        FileError: the file cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of the next bytes of a file, as hex; the file stands behind them then."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _CHUNK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
