"""Probing: measure what a model's predictions suffer when all tensors of one class lose precision.

Each probe gives the tensors of a class a coarse type, and measures the divergence from the untouched model on a text.
Two types tell how the damage grows with what the tensors lose. The model is loaded once: a probe overwrites weights in
memory with what would be decoded of the coarse type, and puts them back from the file. What is finished is kept beside
the output after each probe, so that a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localmix.capacity.memory import available
from localmix.errors import CapacityError, InputError
from localmix.gguf_format import tensor_bytes
from localmix.importance import Importance
from localmix.measurement.corpus import Corpus
from localmix.measurement.divergence import Divergence, open_reference
from localmix.measurement.measuring_child import MeasuringChild
from localmix.measurement.perplexity import ENGINE, Conditions, Layout, Part, ReferenceRows, Tally, cut, decode_chunks
from localmix.measurement.reference import Cache, StoredReference
from localmix.native.devices import PROCESSOR, default_threads
from localmix.native.kernels import decode_rows, dequantize_rows, quantize_rows
from localmix.native.loaded_weights import LoadedWeights
from localmix.native.model import Model
from localmix.optimization.sampled_error import weighted_energy
from localmix.optimization.sensitivities import Measured, Value, encode, tensor_class, tensor_layer
from localmix.output import OutputFile, file_error, write_atomically
from localmix.plan import Planner
from localmix.presets import Preset
from localmix.sources.base import Source, TensorInfo
from localmix.sources.open import open_source
from localmix.tensor_types import FLOAT_TYPES, TensorType, row_bytes
from localmix.worker import Channel, Progress, Report

# Two types far apart, so that chance changes the exponent little; Q2_K stands in for the second where it cannot be.
PROBES = ("Q3_K", "IQ1_S")
# Between which an exponent is believed, and the usual one where no two types tell.
_EXPONENTS = (1.0, 1.7)
_USUAL_EXPONENT = 1.4
CHUNKS = 32
# What a perturbed row can be written back as without losing what the probe is about.
BASES = frozenset({*FLOAT_TYPES, TensorType.Q8_0})
# The classes of the first and the last matrix, and the type in which the first is probed too.
_FIRST, _LAST, FINE = "token_embd", "output", "Q6_K"
_LEAST_SHARE = 0.1  # of a probe's divergence that is not taken for rounding
_SLICE = 1 << 20  # weights that a thread holds


@dataclass(frozen=True)
class Probe:
    """Tensors that lose precision together.

    Attributes:
        kind: their class.
        layer: where they lie; None for all layers.
        coarse: the type that is meant, as `PROBES` has it.
        types: what each gets; where a tensor cannot have the type, another one.
    """

    kind: str
    layer: int | None
    coarse: str
    types: Mapping[str, TensorType]

    @property
    def name(self) -> str:
        """Such as `attn_q in Q3_K`, or `attn_q of layer 3 in Q3_K`."""
        return _name(self.kind, self.layer, self.coarse)


def _name(kind: str, layer: int | None, coarse: str) -> str:
    return f"{kind} in {coarse}" if layer is None else f"{kind} of layer {layer} in {coarse}"


@dataclass(frozen=True)
class Probed:
    """What tensors in other types do to a model.

    Attributes:
        relative_errors: of each tensor: its weighted squared error, divided by its weighted energy.
    """

    divergence: Divergence
    relative_errors: Mapping[str, float]


def measure(
    model: Path,
    corpus: Corpus,
    output: Path,
    importance: Importance | None = None,
    *,
    ctx: int = 512,
    chunks: int | None = CHUNKS,
    per_layer: bool = False,
    resume: bool = False,
    threads: int | None = None,
    cache: Cache | None = None,
    progress: Report | None = None,
) -> Measured:
    """Measure a model's sensitivities, and write them.

    Args:
        model: a GGUF file in F32, F16, BF16 or Q8_0.
        output: the file to write; it appears whole or not at all.
        importance: of this model; weights the errors as quantizing with it will.
        ctx, chunks, threads: see `perplexity.Conditions`.
        per_layer: probe each class in each layer alone, too.
        resume: go on from what a stopped run left beside the output.
        cache: keeps the untouched model's logits; the user's by default.
        progress: (done, in all, what is counted).

    Raises:
        InputError: a file is broken or too short, the model makes no text or is of a type that is too coarse already,
            or what is resumed belongs to another run.
        CapacityError: memory or disk do not suffice.
        FileError: the output cannot be written, or another run writes it; found before the work.
    """
    conditions = Conditions(ctx, chunks, threads, placement=PROCESSOR, repack=False)
    with OutputFile(output, 0) as file, MeasuringChild() as child:
        with open_source(model) as source:
            source.require_generation()
            probes = plan_probes(source, importance, per_layer)
            base = Counter(tensor.type for tensor in source.tensors for _ in range(len(tensor.shape) > 1))
            shape = (source.architecture, source.number("{arch}.block_count"), source.parameters)
            _check_memory(source)
        opened = open_reference(model, corpus, conditions, cache or Cache.of_user(), progress=progress, run=child.run)
        if opened.stored is None or opened.perplexity is None:
            raise CapacityError(" ".join(opened.notes), "Measure fewer chunks with --chunks.")
        journal = _Journal(journal_path(output), _key(opened.stored, importance), resume)
        task = Task(model, corpus, conditions, importance, opened.stored)
        each = opened.perplexity.chunks
        waiting = [probe for probe in probes if probe.name not in journal.found]
        before, number = each * (len(probes) - len(waiting)), 0
        events = child.events(perturb_here, task, [probe.types for probe in waiting]) if waiting else []
        for event in events:
            if isinstance(event, Probed):
                journal.add(waiting[number].name, _Found.of(event))
                number += 1
            elif isinstance(event, Progress) and progress is not None:
                progress(before + event.done, each * len(probes), "chunks")
        rounding = _rounding(journal.found)
        values = {
            (probe.kind, probe.layer): value
            for probe in probes
            if probe.coarse == PROBES[0] and (value := _value(probe, journal.found, rounding)) is not None
        }
        if not values:
            raise InputError(
                f"{model.name}: what it predicts does not depend on its weights.",
                "Check the file with `localmix verify`.",
            )
        measured = Measured(
            model=model.name,
            architecture=shape[0],
            layers=shape[1],
            parameters=shape[2],
            base=base.most_common(1)[0][0].name,
            corpus=corpus.name,
            corpus_sha256=corpus.sha256,
            context=ctx,
            chunks=each,
            engine=ENGINE,
            imatrix=importance is not None,
            probes=", ".join(_commonest(probes, coarse) for coarse in PROBES),
            rounding=rounding,
            classes={kind: value for (kind, layer), value in values.items() if layer is None},
            by_layer={(kind, layer): value for (kind, layer), value in values.items() if layer is not None},
        )
        file.write(0, encode(measured))
        file.commit()
    journal.path.unlink(missing_ok=True)
    return measured


def plan_probes(source: Source, importance: Importance | None, per_layer: bool) -> list[Probe]:
    """A probe in each of `PROBES` for each class of tensors that llama.cpp quantizes, and one for each layer if wanted.

    One of the embeddings in `FINE` tells what rounding alone makes.

    Raises:
        InputError: a weight is in a type that is too coarse to measure from, or nothing can be quantized.
    """
    planner = Planner(source)
    types: dict[str, dict[str, TensorType]] = {}
    for coarse, base in (("Q3_K", "Q3_K_M"), ("IQ1_S", "Q2_K"), (FINE, "Q6_K")):
        planned = planner.plan(Preset(base, base, pure=True), importance=importance)
        types[coarse] = {tensor.info.name: tensor.type for tensor in planned.tensors}
    for tensor in source.tensors:
        covered = importance is not None and tensor.name in importance.entries
        if types["IQ1_S"][tensor.name] == TensorType.Q2_K and covered:
            types["IQ1_S"][tensor.name] = TensorType.IQ1_S
    first = types[PROBES[0]]
    changed = [tensor for tensor in source.tensors if first[tensor.name] not in (tensor.type, *FLOAT_TYPES)]
    lossy = next((tensor for tensor in changed if tensor.type not in BASES), None)
    if lossy is not None:
        raise InputError(
            f"{source.path}: {lossy.name} is {lossy.type.name}, which has lost too much to measure from.",
            "Measure the model in BF16, F16 or Q8_0.",
        )
    if not changed:
        raise InputError(f"{source.path} has no weights that llama.cpp quantizes.")
    together: dict[tuple[str, int | None], list[str]] = {}
    for tensor in changed:
        together.setdefault((tensor_class(tensor.name), None), []).append(tensor.name)
    for tensor in changed if per_layer else []:
        kind, layer = tensor_class(tensor.name), tensor_layer(tensor.name)
        if layer is not None and len(together[kind, None]) > 1:
            together.setdefault((kind, layer), []).append(tensor.name)
    probes = []
    for (kind, layer), names in together.items():
        # how damage grows is the same in all layers of a class, nearly; where it starts is not
        wanted = (*(PROBES if layer is None else PROBES[:1]), *((FINE,) if kind == _FIRST else ()))
        probes += [Probe(kind, layer, coarse, {name: types[coarse][name] for name in names}) for coarse in wanted]
    return probes


def _commonest(probes: Sequence[Probe], coarse: str) -> str:
    """The type that most tensors get in probes."""
    counts = Counter(kind for probe in probes if probe.coarse == coarse for kind in probe.types.values())
    return counts.most_common(1)[0][0].name


def _check_memory(source: Source) -> None:
    """Refuse a model that does not fit: its weights are read, not mapped.

    Raises:
        CapacityError: memory does not suffice.
    """
    weights = sum(tensor_bytes(tensor) for tensor in source.tensors)
    room = available().bytes
    if weights > room:
        raise CapacityError(
            f"{source.path.name} has {weights / 2**30:.1f} GiB of weights, which are overwritten in memory, and"
            f" {room / 2**30:.1f} GiB are available.",
            "Measure a smaller file of the model, such as its Q8_0, or quantize with the priors that are shipped.",
        )


@dataclass(frozen=True)
class _Found:
    """What a probe gave.

    Attributes:
        tensors: how many changed.
        divergence, error: in nats a token.
        relative_error: sum over the tensors.
    """

    tensors: int
    divergence: float
    error: float
    relative_error: float

    @classmethod
    def of(cls, probed: Probed) -> _Found:
        """The sums."""
        lost, divergence = probed.relative_errors, probed.divergence
        return cls(len(lost), divergence.mean, divergence.error, sum(lost.values()))


def _rounding(found: Mapping[str, _Found]) -> float:
    """The divergence that a change makes however small it is; 0 where nothing tells.

    What goes into a quantized weight is rounded, in BF16 a little and in Q8_0 more, and any change before it has all of
    it rounded otherwise. A change that is n times smaller has a divergence n times smaller but for that.
    """
    coarse, fine = (found.get(_name(_FIRST, None, kind)) for kind in (PROBES[0], FINE))
    if coarse is None or fine is None:
        return 0.0
    if not 0 < fine.relative_error < coarse.relative_error:
        return 0.0
    slope = (coarse.divergence - fine.divergence) / (coarse.relative_error - fine.relative_error)
    return max(0.0, fine.divergence - max(0.0, slope) * fine.relative_error)


def _value(probe: Probe, found: Mapping[str, _Found], rounding: float) -> Value | None:
    """The sensitivity that probes show; None where nothing was lost, or nothing depends on it."""
    of_probe = found[probe.name]
    if of_probe.relative_error <= 0 or of_probe.divergence <= 0:
        return None
    exponent = _exponent([found[_name(probe.kind, None, coarse)] for coarse in PROBES], probe.kind, rounding)
    mean = of_probe.relative_error / of_probe.tensors
    damage = _damage(of_probe, probe.kind, rounding)
    # the mean is a good enough stand-in for the tensors' own errors, which are alike
    return Value(
        nats=damage / (of_probe.tensors * mean**exponent),
        exponent=exponent,
        error=of_probe.error / damage,
        tensors=of_probe.tensors,
        divergence=of_probe.divergence,
        relative_error=mean,
    )


def _damage(found: _Found, kind: str, rounding: float) -> float:
    """A probe's divergence without that of rounding, of which there is none behind the output."""
    rounded = 0.0 if kind == _LAST else rounding
    return max(found.divergence - rounded, _LEAST_SHARE * found.divergence)


def _exponent(pair: Sequence[_Found], kind: str, rounding: float) -> float:
    """How damage grows from one probe to a coarser one of the same tensors."""
    errors = [found.relative_error for found in pair]
    damages = [_damage(found, kind, rounding) for found in pair]
    if not (0 < errors[0] < errors[1] and 0 < damages[0] < damages[1]):
        return _USUAL_EXPONENT
    found = math.log(damages[1] / damages[0]) / math.log(errors[1] / errors[0])
    return min(max(found, _EXPONENTS[0]), _EXPONENTS[1])


def journal_path(output: Path) -> Path:
    """Where a run for `output` keeps the probes that are finished."""
    return output.with_name(output.name + ".partial")


def _key(stored: Path, importance: Importance | None) -> str:
    """What two runs have in common if one goes on with the other's probes.

    The name of the stored logits stands for the model, the text, the chunks and the engine.
    """
    entries = sorted(importance.entries.items()) if importance is not None else []
    digest = hashlib.sha256(stored.name.encode())
    for name, entry in entries:
        digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
    return digest.hexdigest()


class _Journal:
    """The finished probes of a run.

    Attributes:
        found: by the probe's name.

    Raises:
        InputError: what is resumed belongs to another run, or is broken.
    """

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path = path
        self.found: dict[str, _Found] = {}
        self._key = key
        if resume and path.exists():
            try:
                document = json.loads(path.read_text("utf-8"))
                same = document["key"] == key
                self.found = {str(name): _Found(**value) for name, value in document["found"].items()}
            except OSError as error:
                raise file_error(error, path, "read") from error
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{path} is broken.", "Run the command without --resume.") from None
            if not same:
                raise InputError(
                    f"{path} is of a run with another model, text, importance matrix or number of chunks.",
                    "Give the same ones, or run the command without --resume.",
                )

    def add(self, name: str, found: _Found) -> None:
        """Keep a finished probe."""
        self.found[name] = found
        document = {"key": self._key, "found": {name: asdict(value) for name, value in self.found.items()}}
        write_atomically(self.path, json.dumps(document).encode())


class PerturbedModel:
    """A loaded model whose weights can be given other types and back.

    Args:
        model: see `LoadedWeights`.
        source: the file that it was loaded from.
        importance: weights the quantization's errors.
        threads: rows in work at once.
    """

    def __init__(self, model: Model, source: Source, importance: Importance | None, threads: int) -> None:
        self._weights = LoadedWeights(model)
        self._source = source
        self._importance = importance
        self._threads = threads
        self._infos = {tensor.name: tensor for tensor in source.tensors}

    def perturb(self, types: Mapping[str, TensorType], check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Give tensors what would be left of them in other types; the relative error of each.

        Those that llama.cpp does not compute with, such as those for predicting several tokens, are left out.

        Args:
            check: called now and then; what it raises ends this, with weights half changed.
        """
        used = {name: kind for name, kind in types.items() if name in self._weights}
        return {name: self._perturb(self._infos[name], kind, check) for name, kind in used.items()}

    def restore(self, names: Sequence[str]) -> None:
        """Put tensors back as they are in the file."""
        for name in names:
            tensor = self._infos[name]
            for start, stop, _ in _slices(tensor):
                stored = np.ascontiguousarray(self._source.read(tensor, start, stop))
                self._write(tensor, start, stored.view(np.uint8))

    def _perturb(self, tensor: TensorInfo, kind: TensorType, check: Callable[[], None]) -> float:
        if self._weights.type_of(tensor.name) != tensor.type:
            raise InputError(f"{self._source.path}: llama.cpp holds {tensor.name} as another type than the file.")
        weighted = self._importance.rows(tensor) if self._importance is not None else None

        def change(piece: tuple[int, int, int]) -> tuple[float, float]:
            check()
            start, stop, expert = piece
            row = None if weighted is None else np.ascontiguousarray(weighted[expert])
            values = decode_rows(tensor.type, self._source.read(tensor, start, stop), tensor.columns)
            changed = dequantize_rows(kind, quantize_rows(kind, values, row), tensor.columns)
            self._write(tensor, start, quantize_rows(tensor.type, changed, None))
            return weighted_energy(changed - values, row), weighted_energy(values, row)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="probe") as pool:
            lost, energy = np.sum(list(pool.map(change, _slices(tensor))), axis=0)
        return float(lost / energy) if energy else 0.0

    def _write(self, tensor: TensorInfo, start: int, rows: npt.NDArray[np.uint8]) -> None:
        self._weights.write(tensor.name, start * row_bytes(tensor.type, tensor.columns), rows)


def _slices(tensor: TensorInfo) -> Iterator[tuple[int, int, int]]:
    """First row, end and expert of pieces of one expert each."""
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    of_expert = tensor.rows // experts
    step = max(1, _SLICE // tensor.columns)
    for expert in range(experts):
        for start in range(0, of_expert, step):
            yield expert * of_expert + start, expert * of_expert + min(start + step, of_expert), expert


@dataclass(frozen=True)
class Task:
    """What the child is to do; see `measure`.

    Attributes:
        stored: logits of the untouched model.
    """

    model: Path
    corpus: Corpus
    conditions: Conditions
    importance: Importance | None
    stored: Path


def perturb_here(channel: Channel, task: Task, probes: Sequence[Mapping[str, TensorType]]) -> None:
    """The child's part: a `Probed` for each probe, in their order, between `Progress` over the chunks of all."""
    threads = task.conditions.threads or default_threads()
    layout = Layout.for_chunks(task.conditions.ctx)
    with (
        StoredReference(task.stored) as reference,
        open_source(task.model) as source,
        Model(task.model, placement=PROCESSOR, mmap=False, repack=False, cancelled=channel.cancelled) as model,
    ):
        chunks = cut(model, task.corpus, task.conditions)
        perturbed = PerturbedModel(model, source, task.importance, threads)
        with layout.open(model, threads, channel) as context:
            for number, types in enumerate(probes):
                lost = perturbed.perturb(types, channel.check)
                with Tally(chunks, threads, paired=True) as tally:
                    for part in decode_chunks(context, chunks, layout, tally.first):
                        tally.add(part, _rows(reference, part, tally.first))
                        done = number * len(chunks) + part.first_chunk
                        channel.progress(done, len(probes) * len(chunks), "chunks")
                perturbed.restore(list(lost))
                channel.emit(Probed(Divergence.of(tally.divergence, tally.same_top), lost))


def _rows(reference: StoredReference, part: Part, first: int) -> ReferenceRows:
    return lambda sequence, start, end: reference.rows(part.first_chunk + sequence, start - first, end - first)
