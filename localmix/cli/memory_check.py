"""The memory check of the commands that load a model to run it: the table, the refusal, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.console import Console
from localmix.cli.parameters import Command

if TYPE_CHECKING:
    from localmix.library import ModelFile
    from localmix.memory import Available, Need
    from localmix.native.devices import Placement

    _Parameter = click.ParamType[int | None]
else:
    _Parameter = click.ParamType  # not generic at run time before click 8.4

# beyond it llama.cpp spends minutes on reserving what no machine has, so --force does not try
_LONGEST_CONTEXT = 2**24

_MOST_LAYERS = 99999


class _Layers(_Parameter):
    """A number of layers; None for `auto`."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        if not str(value).isascii() or not str(value).isdigit() or int(value) > _MOST_LAYERS:
            self.fail(f"{value!r} is neither a number of layers nor auto.", param, ctx)
        return int(value)


def placement_options(function: Command) -> Command:
    """Options for where a model is computed; the command gets `device`, `gpu_layers`, `experts` and `kv_type`."""
    options = (
        click.option(
            "--device",
            metavar="auto|cpu|cuda|metal|NAME",
            default="auto",
            show_default=True,
            help="Where to compute: a kind of device, or names from `localmix doctor` with commas between.",
        ),
        click.option(
            "--gpu-layers",
            metavar="auto|N",
            type=_Layers(),
            default="auto",
            show_default=True,
            help="Layers on the GPU; auto computes how many its memory has room for.",
        ),
        click.option(
            "--experts",
            type=click.Choice(["auto", "cpu", "gpu"]),
            default="auto",
            show_default=True,
            help="Where the experts of a mixture model lie; auto puts as many on the GPU as fit.",
        ),
        click.option(
            "--kv-type",
            type=click.Choice(["f16", "q8_0", "q4_0"]),
            default="f16",
            show_default=True,
            help="Type of the KV cache: q8_0 halves it at hardly a loss.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Choice:
    """How to load a model so that it fits.

    Attributes:
        context: positions of the KV cache.
        kv_type: its type, as `--kv-type` names it.
        placement: what lies on a GPU.
        repack: whether weights may be reordered for the processor, in memory of their own (`Model(repack=…)`).
        need: what it will take.
    """

    context: int
    kv_type: str
    placement: Placement
    repack: bool
    need: Need


@dataclass(frozen=True)
class _Fit:
    """What a file needs: with this context, and the longest context that fits (0 if none does)."""

    context: int
    trained: int
    longest: int
    need: Need


class MemoryCheck:
    """Whether a file fits into memory, and what to say when it does not.

    Args:
        context: positions; None for 4096, less if the model was trained for less.
        kv_type, device, gpu_layers, experts: as `placement_options` gives them.
    """

    def __init__(
        self,
        console: Console,
        context: int | None,
        *,
        kv_type: str = "f16",
        device: str = "auto",
        gpu_layers: int | None = None,
        experts: str = "auto",
    ) -> None:
        from localmix import memory

        self._console = console
        self._context = context
        self._kv_type = kv_type
        self._device = device
        self._gpu_layers = gpu_layers
        self._experts = experts
        self._room = memory.available()
        self._beside_weights: int | None = None

    def fits(self, file: ModelFile) -> bool:
        """Whether a file of the library fits; all files of a model need the same beside their weights."""
        if self._beside_weights is None:
            need = self._look_at(file.path).need
            self._beside_weights = need.total - need.weights
        return file.bytes + self._beside_weights <= self._room.bytes

    def check(self, path: Path, force: bool) -> Choice:
        """How to load the model.

        Raises:
            CapacityError: the model does not fit; a table of what it needs has been drawn.
        """
        from localmix.errors import CapacityError
        from localmix.table import size

        fit = self._look_at(path)
        if fit.context > fit.trained:
            self._console.warn(f"{path.name} was trained for a context of {fit.trained}; beyond it replies get worse.")
        if self._room.fits(fit.need):
            return self._choice(fit)
        _draw_need(self._console, fit, self._room)
        message = (
            f"{path.name} needs {size(fit.need.total)} of memory, but {size(self._room.bytes)} is available:"
            f" {self._room.limit}."
        )
        if force and fit.context <= _LONGEST_CONTEXT:
            self._console.warn(message)
            return self._choice(fit)
        raise CapacityError(message, self._remedies(path, fit))

    def _choice(self, fit: _Fit) -> Choice:
        from localmix.native.devices import PROCESSOR, Placement

        placement = PROCESSOR if self._device == "cpu" else Placement(self._gpu_layers)
        return Choice(fit.context, self._kv_type, placement, True, fit.need)

    def _look_at(self, path: Path) -> _Fit:
        from localmix import memory
        from localmix.sources.open import open_source

        with open_source(path) as source:
            trained = memory.trained_context(source)
            weights = sum(file.stat().st_size for file in source.files())
            context = self._context or min(memory.DEFAULT_CONTEXT, trained)
            longest = memory.largest_context(source, weights, self._room, self._kv_type)
            return _Fit(context, trained, longest, memory.need(source, weights, context, self._kv_type))

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
