"""Whether a model fits this machine, how to load it so that it does, and what would help when it does not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.capacity import memory
from localmix.capacity.memory import Available, Need, Verdict
from localmix.capacity.placement import Split, Weights, split, weigh
from localmix.capacity.requirements import Requirements, repacked_bytes
from localmix.capacity.simulation import Setting
from localmix.errors import InputError, LocalmixError
from localmix.native.devices import PROCESSOR, Device, Placement, choose_gpus, has_gpu_backend
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.tensor_types import FLOAT_TYPES

if TYPE_CHECKING:
    from localmix.worker import Channel

# Where the formulas find less than this share of the memory taken, llama.cpp is not asked.
_CLEARLY_FITS = 0.5
_HUB_SECONDS = 5.0  # a remedy is not worth waiting for longer


@dataclass(frozen=True)
class Wish:
    """How the user wants a model to be run.

    Attributes:
        context: positions of each sequence; None for 4096, less if the model was trained for less.
        kv_type: as `Setting` has it.
        device: as `choose_gpus` reads it.
        gpu_layers: None for as many as fit.
        experts: auto, cpu or gpu.
        sequences: how many texts are worked on at once.
        generation: refuse models that write no text, such as BERT.
        embeddings: make vectors instead of text, which takes a text as a whole; models that write none always do.
        remote: devices of other machines, which are used beside those of `device`.
        batch, outputs: as `Setting` has them.
    """

    context: int | None = None
    kv_type: str = "f16"
    device: str = "auto"
    gpu_layers: int | None = None
    experts: str = "auto"
    sequences: int = 1
    generation: bool = True
    embeddings: bool = False
    remote: tuple[Device, ...] = ()
    batch: int = Setting.batch
    outputs: int = Setting.outputs


@dataclass(frozen=True)
class Fit:
    """How a model goes into this machine.

    Attributes:
        setting: the context and its type.
        trained: positions the model was trained for.
        need: of the processor's memory.
        room: of the processor's memory.
        verdict: about the processor's memory, and the GPUs' where `split` has them.
        split: what lies on which GPU.
        gpus: those that are used.
        repack: whether weights may be copied in the processor's own order.
        notes: sentences that the user should see.
        embeddings: whether it makes vectors instead of text.
        layers: how many can lie on GPUs, the output layer counted; 0 where there is none.
    """

    path: Path
    setting: Setting
    trained: int
    need: Need
    room: Available
    verdict: Verdict
    split: Split
    gpus: tuple[Device, ...] = ()
    repack: bool = True
    notes: tuple[str, ...] = ()
    embeddings: bool = False
    layers: int = 0

    @property
    def context(self) -> int:
        """Positions of each sequence."""
        return self.setting.context // self.setting.sequences

    @property
    def placement(self) -> Placement:
        """What lies on a GPU."""
        return self.split.placement


class Examiner:
    """Examines files under one wish; models of one shape are simulated once.

    Args:
        wish: how they are to be run.
        room: of the processor's memory.
        gpus: to be used; None to look for those that the wish means.
    """

    def __init__(self, wish: Wish, room: Available, gpus: Sequence[Device] | None = None) -> None:
        self._wish = wish
        self._room = room
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Requirements] = {}
        self._gpus = gpus

    def examine(self, path: Path, sequences: int | None = None) -> Fit:
        """How a model's file goes into this machine.

        Args:
            sequences: in place of the wish's.

        Raises:
            InputError: it is no model that can be read, or none that writes text.
            UsageError: the wish names a device that is not there.
        """
        with open_source(path) as source:
            wish = self._wish
            if wish.generation:
                source.require_generation()
            trained = memory.trained_context(source)
            context = wish.context or min(memory.DEFAULT_CONTEXT, trained)
            if not source.generates:
                context = min(context, trained)  # it has learned a vector for each position
            count = sequences or wish.sequences
            setting = Setting(context * count, wish.kv_type, wish.batch, count, wish.outputs)
            embeddings = wish.embeddings or not source.generates
            if embeddings:
                setting = replace(setting, batch=context)
            fit = self._fit(source, weigh(source.tensors), setting)
            return replace(fit, path=path, trained=trained, embeddings=embeddings)

    def beside(self, path: Path) -> Available:
        """What a file leaves of the processor's memory for another model, in the same program."""
        from localmix.sizes import size

        need = self.examine(path).need
        taken = need.total - need.program
        limit = f"{self._room.limit}, without the {size(taken)} of {path.name}"
        return Available(max(0, self._room.bytes - taken), limit)

    def after(self, fit: Fit) -> Examiner:
        """One for a further model, beside another program that holds this one."""
        from localmix.sizes import size

        limit = f"{self._room.limit}, without the {size(fit.need.total)} of {fit.path.name}"
        room = Available(max(0, self._room.bytes - fit.need.total), limit)
        held = fit.split.devices
        gpus = [replace(gpu, free=max(0, gpu.free - held.get(gpu.name, 0))) for gpu in self._find_gpus()]
        return Examiner(self._wish, room, gpus)

    def remedies(self, fit: Fit) -> list[str]:
        """What would help a model that does not run well, each a sentence, the most useful first."""
        with open_source(fit.path) as source:
            return list(self._remedies(source, fit))

    def _fit(self, source: Source, weights: Weights, setting: Setting) -> Fit:
        requirements = self._requirements(source)
        gpus = self._find_gpus()
        notes: tuple[str, ...] = ()
        if any(not gpu.total for gpu in gpus) and self._wish.gpu_layers is None:
            silent = next(gpu.name for gpu in gpus if not gpu.total)
            notes = (f"{silent} does not say how much memory it has: name a number with --gpu-layers to use it.",)
            gpus = []
        elif not gpus and self._wish.gpu_layers:
            notes = (f"--gpu-layers {self._wish.gpu_layers} does nothing: there is no GPU to be used.",)
        if gpus and self._wish.gpu_layers != 0:
            found = self._with_gpus(requirements, weights, setting, gpus, self._wish.gpu_layers)
            if found.placement.gpu_layers:
                return found
            if self._wish.remote:
                notes = ("No machine given with --rpc has room for a layer: all of it is computed here.",)
        need = requirements.need(weights, setting)
        if need.total > _CLEARLY_FITS * self._room.bytes:
            requirements.simulate([setting])
            need = requirements.need(weights, setting, repacked_bytes(weights))
        verdict = self._room.verdict(need)
        repack = need.anonymous <= self._room.bytes
        return Fit(source.path, setting, 0, need, self._room, verdict, Split(PROCESSOR), repack=repack, notes=notes)

    def _with_gpus(
        self,
        requirements: Requirements,
        weights: Weights,
        setting: Setting,
        gpus: Sequence[Device],
        gpu_layers: int | None,
    ) -> Fit:
        wish = self._wish
        named = wish.device != "auto" or bool(wish.remote)
        names = tuple(gpu.name for gpu in gpus) if named else ()
        servers = tuple(dict.fromkeys(gpu.server for gpu in gpus if gpu.server))
        placement = Placement(len(weights.layers) + 1, 0, names, servers)
        # Fewer layers on a GPU can take a larger buffer there: split again with the larger of the two.
        largest: dict[str, int] = {}
        for _ in range(2):
            requirements.simulate([setting], placement)
            buffers = requirements.buffers(setting, placement)
            for gpu in gpus:
                size = buffers.compute.get(gpu.name, sum(buffers.compute.values()))
                largest[gpu.name] = max(size, largest.get(gpu.name, 0))
            kv = [buffers.layers.get(layer, 0) for layer in range(len(weights.layers))]
            found = split(weights, kv, largest, gpus, gpu_layers=gpu_layers, experts=wish.experts, named=named)
            placement = found.placement
        requirements.simulate([setting], placement)
        shared = all(gpu.shares_memory for gpu in gpus)
        need = requirements.need_beside(weights, setting, found, shared)
        verdict = self._room.verdict(need) if found.fits else Verdict.NO
        return Fit(Path(), setting, 0, need, self._room, verdict, found, tuple(gpus), layers=len(weights.layers) + 1)

    def _requirements(self, source: Source) -> Requirements:
        shape = tuple((tensor.name, tensor.shape) for tensor in source.tensors)
        return self._known.setdefault(shape, Requirements(source))

    def _find_gpus(self) -> Sequence[Device]:
        if self._gpus is None:
            self._gpus = [*self._wish.remote, *find_gpus(self._wish.device)]
        return self._gpus

    def _remedies(self, source: Source, fit: Fit) -> Iterator[str]:
        from localmix.sizes import size

        weights = weigh(source.tensors)

        def verdict(setting: Setting) -> Verdict:
            return self._fit(source, weights, setting).verdict

        yield from self._smaller(source, fit)
        requirements = self._requirements(source)
        sequences = fit.setting.sequences
        if sequences > 1:
            single = replace(fit.setting, context=fit.context, sequences=1)
            then = verdict(single)
            if then is not fit.verdict and then is not Verdict.NO:
                yield f"`--slots 1` {then.value}."
        if not fit.gpus:
            for wanted in (Verdict.RUNS_WELL, Verdict.LOADS):
                longest = self._longest(requirements, weights, fit.setting, wanted) // sequences
                if 0 < longest < fit.context:
                    yield f"`--ctx {longest}` {wanted.value}."
                if longest or fit.verdict is Verdict.LOADS:
                    break
        elif not fit.split.fits:
            fitting = self._with_gpus(requirements, weights, fit.setting, fit.gpus, None).split
            yield f"`--gpu-layers {fitting.placement.gpu_layers}` fits."
        small = replace(fit.setting, kv_type="q8_0")
        if fit.setting.kv_type == "f16" and not requirements.refuses(small):
            requirements.simulate([fit.setting])
            saved = requirements.buffers(fit.setting).kv - requirements.buffers(small).kv
            then = verdict(small)
            better = f", then it {then.value}" if then is not fit.verdict and then is not Verdict.NO else ""
            yield f"`--kv-type q8_0` saves {size(saved)}{better}."

    def _longest(self, requirements: Requirements, weights: Weights, setting: Setting, wanted: Verdict) -> int:
        def fits(tried: Setting) -> bool:
            return self._room.verdict(requirements.need(weights, tried)) in (Verdict.RUNS_WELL, wanted)

        return requirements.largest_context(setting, fits)

    def _smaller(self, source: Source, fit: Fit) -> Iterator[str]:
        """The largest file of the library, or the largest type that could be made or fetched, that runs well."""
        from localmix import library

        model = library.find(library.model_name(fit.path))
        for file in model.files if model else ():
            if (
                file.bytes < fit.need.weights + fit.split.weights
                and self.examine(file.path).verdict is Verdict.RUNS_WELL
            ):
                yield f"`localmix chat {file.name}` runs well."
                return
        if model is None:
            return
        try:
            origin = library.resolve(model.name, library.Purpose.SOURCE)
        except LocalmixError:
            kind = _on_hub(model.folder, fit)
            if kind:
                yield f"`localmix pull {kind}` fetches one that runs well."
            return
        with open_source(origin) as whole:
            for kind, weights in planned(whole):
                if self._fit(whole, weights, fit.setting).verdict is Verdict.RUNS_WELL:
                    yield f"`localmix quantize {kind} {model.name}` makes one that runs well."
                    return


def _on_hub(folder: Path, fit: Fit) -> str:
    """The largest GGUF file that runs well in the repository that a model came from, as `localmix pull` takes it.

    Returns:
        Nothing if there is none, or if the hub does not say in time.
    """
    from localmix.downloads.hub import gguf_type, look_up
    from localmix.downloads.pull_record import read_record

    name = next((pulled.repository for pulled in read_record(folder).values()), "")
    found: dict[str, int] = {}

    def ask() -> None:
        with contextlib.suppress(LocalmixError):
            for file in look_up(name).files:
                if file.name.lower().endswith(".gguf"):
                    kind = f"{name}:{gguf_type(file.name)}"
                    found[kind] = found.get(kind, 0) + file.bytes

    if name:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_HUB_SECONDS)
    room = fit.room.bytes - (fit.need.total - fit.need.weights)
    return max((kind for kind, size in list(found.items()) if size <= room), key=found.__getitem__, default="")


def planned(source: Source, names: Iterable[str] | None = None) -> list[tuple[str, Weights]]:
    """The quantization types of the presets with what their weights take, the largest first.

    Args:
        names: of presets; None for all.
    """
    from localmix.plan import COPY, Planner
    from localmix.presets import load_presets

    presets = load_presets()
    planner = Planner(source)
    found = []
    for name in presets.presets if names is None else names:
        preset = presets.find(name)
        if names is None and preset.base == COPY:
            continue
        plan = planner.plan(preset, has_imatrix=preset.imatrix in ("required", "recommended"))
        found.append((plan.type, weigh(replace(tensor.info, type=tensor.type) for tensor in plan.tensors)))
    return sorted(found, key=lambda entry: -entry[1].total)


def find_gpus(wanted: str) -> list[Device]:
    """The GPUs that `--device` means; the drivers are started in a child process.

    Raises:
        UsageError: there is no such device.
    """
    from localmix import worker

    if wanted == "cpu" or (wanted == "auto" and not has_gpu_backend()):
        return []
    try:
        found = worker.run(list_devices)
    except InputError:
        if wanted == "auto":  # a driver that crashes: the processor is left
            return []
        raise
    return choose_gpus(found, wanted)


def list_devices(_: Channel) -> list[Device]:
    """The child's job: llama.cpp's devices."""
    from localmix.native.devices import devices

    return devices()


@dataclass(frozen=True)
class FitRow:
    """One type of a model: its need at each context, with the verdicts."""

    type: str
    weights: int
    in_library: bool
    needs: tuple[Need, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class FitTable:
    """Types by contexts.

    Attributes:
        simulated: whether llama.cpp itself was asked about the contexts.
    """

    path: Path
    room: Available
    kv_type: str
    contexts: tuple[int, ...]
    rows: tuple[FitRow, ...]
    simulated: bool


def fit_table(
    path: Path,
    room: Available,
    *,
    names: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    kv_type: str = "f16",
) -> FitTable:
    """How each type of a model goes into memory, for several contexts; nothing is on a GPU.

    A model in full precision is planned in all types, a quantized file is taken as it is, with its neighbours in
    the library.

    Args:
        path: a checkpoint, a folder with a config.json, or a GGUF file.
        names: presets to plan; None for all.
        contexts: None for the powers of two from 2048 up to the trained context.
    """
    from localmix import library

    model = library.find(library.model_name(path))
    made = {file.type for file in model.files} if model else set()
    with open_source(path) as source:
        if names is None and path.is_file() and any(tensor.type not in FLOAT_TYPES for tensor in source.tensors):
            files = [file.path for file in model.files] if model else []
            candidates = _files(files if path in files else [path])
        else:
            candidates = planned(source, names)
        trained = memory.trained_context(source)
        contexts = contexts or _powers(trained)
        requirements = Requirements(source)
        settings = [Setting(context, kv_type) for context in contexts]
        requirements.simulate(settings)
        rows = []
        for kind, weights in candidates:
            repacked = repacked_bytes(weights)
            needs = tuple(requirements.need(weights, setting, repacked) for setting in settings)
            rows.append(FitRow(kind, weights.total, kind in made, needs, tuple(map(room.verdict, needs))))
    return FitTable(path, room, kv_type, tuple(contexts), tuple(rows), requirements.simulated)


def _files(paths: Iterable[Path]) -> list[tuple[str, Weights]]:
    from localmix import library

    found = []
    for path in paths:
        with open_source(path) as source:
            found.append((library.split_name(path)[1] or path.name, weigh(source.tensors)))
    return found


def _powers(trained: int) -> list[int]:
    """2048, 4096 and so on to the trained context, which ends the row; of a short one the halves and quarters too."""
    start = min(2048, max(256, trained // 4))
    found = []
    while start < trained:
        found.append(start)
        start *= 2
    return [*found, trained]
