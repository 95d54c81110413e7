"""JSON files of a checkpoint, read with bounds: size, encoding, nesting, duplicate keys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localmix.errors import InputError
from localmix.sources.positional import read_whole

# tokenizer.json of the largest vocabularies has about 30 MB; everything else is far smaller.
DOCUMENT_LIMIT = 256 * 2**20

_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """A foreign value as it may appear in a message: escaped, of bounded length, strings in quotes."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS] + "…"
    if not text.isprintable():
        return ascii(text)
    return repr(text) if isinstance(value, str) else text


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first `most` of them, and how many more there are."""
    every = list(names)
    head = ", ".join(shown(name) for name in every[:most])
    return f"{head} and {len(every) - most} more" if len(every) > most else head


def parse_json(data: bytes, origin: str, *, unique_keys: bool = False, encoding: str = "utf-8-sig") -> Any:
    """A JSON document from foreign bytes.

    Args:
        origin: what the bytes are, to begin a sentence with ("model.safetensors: the header").
        unique_keys: refuse an object that names a key twice.
        encoding: `utf-8-sig` lets a byte order mark pass, `utf-8` does not.

    Raises:
        InputError: not UTF-8, not JSON, nested too deep, or a key twice.
    """

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise InputError(f"{origin} names {shown(key)} twice.", "Download the file again.")
                seen.add(key)
        return found

    try:
        return json.loads(data.decode(encoding), object_pairs_hook=collect if unique_keys else None)
    except UnicodeDecodeError as error:
        raise InputError(f"{origin} is not UTF-8 (byte {error.start}).", "Download the file again.") from error
    except RecursionError as error:
        raise InputError(f"{origin} is nested too deep to be what it claims.") from error
    except ValueError as error:
        raise InputError(f"{origin} is not valid JSON: {error}.", "Download the file again.") from error


def read_object(path: Path, *, unique_keys: bool = False, limit: int = DOCUMENT_LIMIT) -> dict[str, Any]:
    """The JSON object in a file; a byte order mark is tolerated.

    Raises:
        InputError: not a file, too big, not JSON, or not an object.
        FileError: missing or unreadable.
    """
    document = parse_json(read_whole(path, limit), str(path), unique_keys=unique_keys)
    if not isinstance(document, dict):
        raise InputError(f"{path} holds {type(document).__name__}, not a JSON object.")
    return document


def read_optional_object(path: Path) -> dict[str, Any]:
    """As `read_object`; an absent file is an empty object."""
    return read_object(path) if os.path.exists(path) else {}
