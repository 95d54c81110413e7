"""The memory check of the commands that load a model to run it: the table, the refusal, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.cli.console import Console

if TYPE_CHECKING:
    from localmix.library import ModelFile
    from localmix.memory import Available, Need

# beyond it llama.cpp spends minutes on reserving what no machine has, so --force does not try
_LONGEST_CONTEXT = 2**24


@dataclass(frozen=True)
class _Fit:
    """What a file needs: with this context, and the longest context that fits (0 if none does)."""

    context: int
    trained: int
    longest: int
    need: Need


class MemoryCheck:
    """Whether a file fits into memory, and what to say when it does not."""

    def __init__(self, console: Console, context: int | None) -> None:
        from localmix import memory

        self._console = console
        self._context = context
        self._room = memory.available()
        self._beside_weights: int | None = None

    def fits(self, file: ModelFile) -> bool:
        """Whether a file of the library fits; all files of a model need the same beside their weights."""
        if self._beside_weights is None:
            need = self._look_at(file.path).need
            self._beside_weights = need.total - need.weights
        return file.bytes + self._beside_weights <= self._room.bytes

    def check(self, path: Path, force: bool) -> int:
        """The context to load the model with.

        Raises:
            CapacityError: the model does not fit; a table of what it needs has been drawn.
        """
        from localmix.errors import CapacityError
        from localmix.table import size

        fit = self._look_at(path)
        if fit.context > fit.trained:
            self._console.warn(f"{path.name} was trained for a context of {fit.trained}; beyond it replies get worse.")
        if self._room.fits(fit.need):
            return fit.context
        _draw_need(self._console, fit, self._room)
        message = (
            f"{path.name} needs {size(fit.need.total)} of memory, but {size(self._room.bytes)} is available:"
            f" {self._room.limit}."
        )
        if force and fit.context <= _LONGEST_CONTEXT:
            self._console.warn(message)
            return fit.context
        raise CapacityError(message, self._remedies(path, fit))

    def _look_at(self, path: Path) -> _Fit:
        from localmix import memory
        from localmix.sources.open import open_source

        with open_source(path) as source:
            trained = memory.trained_context(source)
            weights = sum(file.stat().st_size for file in source.files())
            context = self._context or min(memory.DEFAULT_CONTEXT, trained)
            longest = memory.largest_context(source, weights, self._room)
            return _Fit(context, trained, longest, memory.need(source, weights, context))

    def _remedies(self, path: Path, fit: _Fit) -> str:
        from localmix import library

        model = library.find(library.model_name(path))
        smaller = [file for file in (model.files if model else ()) if file.path != path and self.fits(file)]
        if smaller:
            fitting = f"`localmix chat {smaller[0].name}` fits"
        elif 0 < fit.longest < fit.context:
            fitting = f"`--ctx {fit.longest}` fits"
        else:
            fitting = "`localmix plan` shows which types fit"
        anyway = "or go on anyway with --force" if fit.context <= _LONGEST_CONTEXT else "or ask for less with --ctx"
        return f"{fitting}. Or close other programs, {anyway}."


def _draw_need(console: Console, fit: _Fit, room: Available) -> None:
    from localmix.table import Column, Table, size_unit

    need = fit.need
    rows = {
        "weights": need.weights,
        f"KV cache of {fit.context} positions": need.kv,
        "compute buffers": need.compute,
        "vocabulary and program": need.other,
        "needed": need.total,
        "available": room.bytes,
    }
    unit, name = size_unit(rows.values())
    cells = tuple((what, f"{count / unit:.2f}") for what, count in rows.items())
    console.table(Table((Column("Memory", number=False), Column(name)), cells), to_messages=True)
