"""The memory check of the commands that load a model to run it: the table, the refusal, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.console import Console
from localmix.cli.parameters import Command

if TYPE_CHECKING:
    from localmix.capacity.fit import Fit
    from localmix.capacity.memory import Need
    from localmix.distribution.protocol import Endpoint
    from localmix.library import ModelFile
    from localmix.native.devices import Device, Placement

    _Parameter = click.ParamType[int | None]
    _WorkersParameter = click.ParamType[tuple[Endpoint, ...]]
else:
    _Parameter = _WorkersParameter = click.ParamType  # not generic at run time before click 8.4

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


class _Endpoints(_WorkersParameter):
    """Addresses of workers."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Endpoint, ...]:
        from localmix.distribution.protocol import parse_endpoints

        return parse_endpoints(value) if isinstance(value, str) else value


def rpc_option(function: Command) -> Command:
    """The option for other machines; the command gets `rpc`, a tuple of endpoints."""
    return click.option(
        "--rpc",
        metavar="HOST:PORT[,…]",
        type=_Endpoints(),
        default=(),
        help="Spread the model over these machines too, where `localmix worker` runs.",
    )(function)


@dataclass(frozen=True)
class Choice:
    """How to load a model so that it fits.

    Attributes:
        context: positions of the KV cache, for each slot.
        kv_type: its type, as `--kv-type` names it.
        placement: what lies on a GPU.
        repack: whether weights may be reordered for the processor, in memory of their own (`Model(repack=…)`).
        need: what it will take.
        slots: texts that are worked on at once.
        embeddings: whether it makes vectors instead of text.
        devices: what the placement uses beside the processor, as a user knows them.
    """

    context: int
    kv_type: str
    placement: Placement
    repack: bool
    need: Need
    slots: int = 1
    embeddings: bool = False
    devices: tuple[str, ...] = ()


class MemoryCheck:
    """Whether a file fits into memory, and what to say when it does not.

    Args:
        context: positions for each slot; None for 4096, less if the model was trained for less.
        kv_type, device, gpu_layers, experts: as `placement_options` gives them.
        draft: a second model that is loaded with the first, in the same context.
        slots: how many texts are to be worked on at once; of several numbers the first that runs well is taken, else
            the last.
        generation: refuse models that write no text.
        embeddings: make vectors instead of text.
        remote: devices of other machines that it is spread over; the draft model is not.
        batch: tokens that are computed at once, with logits for each; None for the engine's choice, with one's.
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
        draft: Path | None = None,
        slots: Sequence[int] = (1,),
        generation: bool = True,
        embeddings: bool = False,
        remote: tuple[Device, ...] = (),
        batch: int | None = None,
    ) -> None:
        from localmix.capacity import memory
        from localmix.capacity.fit import Examiner, Wish

        self._console = console
        self._slots = slots
        wish = Wish(context, kv_type, device, gpu_layers, experts, slots[-1], generation, embeddings, remote)
        if batch is not None:
            wish = replace(wish, batch=batch, outputs=batch)
        self._told: set[str] = set()
        room = memory.available()
        if draft is not None:
            room = Examiner(replace(wish, device="cpu", remote=()) if remote else wish, room).beside(draft)
        self._examiner = Examiner(wish, room)

    def fits(self, file: ModelFile) -> bool:
        """Whether a file of the library runs well."""
        from localmix.capacity.memory import Verdict

        return self._examiner.examine(file.path).verdict is Verdict.RUNS_WELL

    def reserve(self, path: Path) -> None:
        """Take a model that was checked for one that other programs hold: the next ones come beside it."""
        self._examiner = self._examiner.after(self._examine(path))

    def _examine(self, path: Path) -> Fit:
        from localmix.capacity.memory import Verdict

        for slots in self._slots:
            fit = self._examiner.examine(path, slots)
            if fit.verdict is Verdict.RUNS_WELL:
                break
        return fit

    def check(self, path: Path, force: bool) -> Choice:
        """How to load the model; what is worth knowing has been said.

        Raises:
            CapacityError: the model cannot be loaded; a table of what it needs has been drawn.
            UsageError: there is no such device.
        """
        from localmix.capacity.memory import Verdict

        fit = self._examine(path)
        if fit.context > fit.trained:
            self._console.warn(f"{path.name} was trained for a context of {fit.trained}; beyond it replies get worse.")
        choice = self._choose(fit)
        if fit.verdict is not Verdict.RUNS_WELL:
            _draw_need(self._console, fit)
            self._admit(fit, force, self._examiner.remedies(fit), "Ask for less with --ctx.")
        return choice

    def admit(self, path: Path, force: bool, remedy: str) -> None:
        """As `check`, for a command with other options than `chat`, which places the model by itself.

        Args:
            remedy: a sentence on what to ask for instead.

        Raises:
            CapacityError: the model cannot be loaded; a table of what it needs has been drawn.
            UsageError: there is no such device.
        """
        from localmix.capacity.memory import Verdict

        fit = self._examine(path)
        if fit.verdict is not Verdict.RUNS_WELL:
            _draw_need(self._console, fit)
            self._admit(fit, force, [] if fit.verdict is Verdict.LOADS else [remedy], remedy)

    def _admit(self, fit: Fit, force: bool, remedies: Sequence[str], less: str) -> None:
        """Warn about a model that does not run well, or refuse it."""
        from localmix.capacity.memory import Verdict
        from localmix.errors import CapacityError

        possible = fit.context <= _LONGEST_CONTEXT
        if fit.verdict is Verdict.LOADS or (force and possible):
            self._console.warn(" ".join((_sentence(fit), *remedies)))
            return
        last = "Or go on anyway with --force." if possible else less
        raise CapacityError(_sentence(fit), " ".join(dict.fromkeys((*remedies, last))))

    def advise(self, path: Path) -> Choice:
        """As `check`, but a model that does not fit is only warned about, and its context is the command's matter.

        Raises:
            UsageError: there is no such device.
        """
        from localmix.capacity.memory import Verdict

        fit = self._examiner.examine(path)
        if fit.verdict is not Verdict.RUNS_WELL:
            self._console.warn(_sentence(fit))
        return self._choose(fit)

    def _choose(self, fit: Fit) -> Choice:
        """How to load it; says what is worth knowing, once."""
        for note in fit.notes:
            if note not in self._told:
                self._console.warn(note)
        self._told.update(fit.notes)
        if fit.placement.layer_counts and (spread := f"{fit.path.name}: {_on_gpus(fit)}") not in self._told:
            self._told.add(spread)
            self._console.note(spread)
        slots, kv_type = fit.setting.sequences, fit.setting.kv_type
        used = tuple(gpu.title for gpu in fit.gpus if fit.split.devices.get(gpu.name))
        return Choice(fit.context, kv_type, fit.placement, fit.repack, fit.need, slots, fit.embeddings, used)


def _sentence(fit: Fit) -> str:
    """What is wrong, with numbers."""
    from localmix.capacity.memory import FLOOR_GB, Verdict, is_below_floor
    from localmix.capacity.placement import RESERVE_BYTES
    from localmix.sizes import size

    name, room = fit.path.name, fit.room
    if not fit.split.fits:
        device = next(gpu for gpu in fit.gpus if gpu.name in fit.split.overfull)
        has = "whose working set has" if device.shares_memory else "which has"
        return (
            f"{name} puts {size(fit.split.devices[device.name])} on {device.title}, {has} {size(device.free)} free"
            f" and needs {size(RESERVE_BYTES)} of that for itself."
        )
    have = f"{size(room.bytes)} is available: {room.limit}"
    if fit.verdict is Verdict.LOADS:
        missing = size(fit.need.total - room.bytes)
        said = (
            f"{name} needs {size(fit.need.total)} of memory, but {have}. It loads, and {missing} of its weights are"
            " read from the disk again and again, which is slow."
        )
    else:
        said = f"{name} needs {size(fit.need.mapped.anonymous)} of memory besides its weights, but {have}."
    below = f" This machine has less than the {FLOOR_GB} GB that localmix is made for." if is_below_floor() else ""
    return said + below


def _draw_need(console: Console, fit: Fit) -> None:
    from localmix.presentation.table import Column, Table
    from localmix.sizes import size_unit

    need = fit.need
    rows = {
        "weights, mapped from the file": need.weights - need.repacked,
        "weights in this processor's order": need.repacked,
        f"KV cache of {fit.setting.context} positions in {fit.setting.kv_type}": need.kv,
        "compute buffers": need.compute + need.output,
        "vocabulary and program": need.vocabulary + need.program,
        "needed": need.total,
        "available": fit.room.bytes,
    }
    for gpu in fit.gpus:
        rows[f"on {gpu.title}"] = fit.split.devices.get(gpu.name, 0)
        rows[f"free on {gpu.title}"] = gpu.free
    rows = {what: count for what, count in rows.items() if count}
    unit, name = size_unit(rows.values())
    cells = tuple((what, f"{count / unit:.2f}") for what, count in rows.items())
    console.table(Table((Column("Memory", number=False), Column(name)), cells, _on_gpus(fit)), to_messages=True)


def _on_gpus(fit: Fit) -> str:
    """What of the model lies on GPUs, in words; empty for nothing."""
    placement = fit.placement
    if not placement.gpu_layers:
        return ""
    kept = placement.cpu_expert_layers
    experts = f"; the experts of the first {kept} layers stay in the processor's memory" if kept else ""
    if not placement.layer_counts:
        return f"{placement.gpu_layers} layers on {', '.join(gpu.title for gpu in fit.gpus)}{experts}."
    counts = zip(placement.layer_counts, fit.gpus, strict=True)
    parts = ", ".join(f"{count} on {gpu.title}" for count, gpu in counts if count)
    return f"Of {fit.layers} layers {parts}, and {fit.layers - placement.gpu_layers or 'none'} here{experts}."
