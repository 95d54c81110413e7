"""Which engine a request's `model` means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

from localmix.library import split_file_name


class Named(Protocol):
    """Anything with a model's name."""

    @property
    def name(self) -> str:
        """As the library has it: `tinymix:Q8_0`."""


Found = TypeVar("Found", bound=Named)


def find_named(engines: Sequence[Found], asked: str) -> Found | None:
    """The engine that is meant, or None.

    Args:
        asked: its name, also in other letters, as a file's name (`tinymix-Q8_0.gguf`), without the type (the first
            engine of that model), or with the short type that the library knows (`Q4_K` for `Q4_K_M`).
    """
    for engine in engines:
        if engine.name == asked:
            return engine
    model, kind = _parts(asked)
    parts = [(engine, _parts(engine.name)) for engine in engines]
    for wanted in ((model, kind), (model, f"{kind}_m")) if kind else ():
        for engine, known in parts:
            if known == wanted:
                return engine
    return None if kind else next((engine for engine, known in parts if known[0] == model), None)


def _parts(name: str) -> tuple[str, str]:
    """Model and type in small letters, the type empty where none is named."""
    bare = name.strip().lower()
    if ":" in bare:
        model, _, kind = bare.partition(":")
        return model, kind
    model, kind = split_file_name(PurePosixPath(bare).name)
    return model, kind.lower()
