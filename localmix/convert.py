"""convert: a checkpoint becomes one GGUF file with the weights as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.errors import InputError, UsageError
from localmix.native.devices import default_threads
from localmix.native.mixture import file_type
from localmix.plan import COPY, Plan, Planner, check_quantizable
from localmix.presets import Preset, load_presets
from localmix.sources.adapter import Lora
from localmix.sources.base import Source
from localmix.sources.gguf import GGUFFile
from localmix.sources.open import open_source
from localmix.stream import Progress, write_outputs
from localmix.tensor_types import FLOAT_TYPES

if TYPE_CHECKING:
    from localmix.downloads.arrivals import Arrivals

TYPES = ("auto", "bf16", "f16", "f32")


@dataclass(frozen=True)
class Converted:
    """The finished file."""

    path: Path
    architecture: str
    tensors: int
    parameters: int
    bytes: int
    type: str
    notes: tuple[str, ...]


def weight_type(source: Source) -> str:
    """The plain type that most weights of a source have: `BF16`, `F16` or `F32`.

    Raises:
        InputError: most are quantized.
    """
    name = _most_weights(source)
    if name not in {kind.name for kind in FLOAT_TYPES}:
        raise InputError(f"{source.path} is already quantized ({name}).", "Convert the checkpoint it came from.")
    return name


def _most_weights(source: Source) -> str:
    weights: Counter[str] = Counter()
    for tensor in source.tensors:
        weights[tensor.type.name] += tensor.elements
    return weights.most_common(1)[0][0]


def conversion_preset(source: Source, kind: str = "auto") -> Preset:
    """What `convert` makes of a source: `BF16`, `F16` or `F32`.

    With `auto` a GGUF file that is repaired (see `GGUFFile.repairs`) keeps every weight's type, quantized ones too.

    Raises:
        UsageError: the type is not one of `TYPES`.
        InputError: the source is quantized, and there is nothing to repair.
    """
    if kind.lower() not in TYPES:
        raise UsageError(f"{kind!r} is no type to convert to.", f"One of {', '.join(TYPES)}.")
    if kind.lower() != "auto":
        return load_presets().find(kind)
    if isinstance(source, GGUFFile) and source.repairs:
        return Preset(_type_of_file(source), COPY)
    return load_presets().find(weight_type(source))


def _type_of_file(source: Source) -> str:
    """The type that a GGUF file says it has; that of most weights when it says nothing that is known."""
    number = source.get("general.file_type")
    for name, preset in load_presets().presets.items():
        if preset.base == name != COPY and file_type(name) == number:
            return name
    return _most_weights(source)


def plan_conversion(source: Source, kind: str = "auto") -> Plan:
    """The plan of `convert`: `auto` keeps the type the weights have, so nothing is lost.

    Raises:
        UsageError: the type is not one of `TYPES`.
        InputError: the source is quantized (see `conversion_preset`), or llama.cpp does not know the model.
    """
    plan = Planner(source).plan(conversion_preset(source, kind))
    check_quantizable(plan, source)
    return plan


def convert(
    model: Path,
    output: Path,
    kind: str = "auto",
    *,
    pre: str | None = None,
    loras: Sequence[Lora] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    arrivals: Arrivals | None = None,
) -> Converted:
    """Write a model as one GGUF file in BF16, F16 or F32.

    Args:
        model: checkpoint folder or GGUF file.
        output: the file to write.
        kind: `auto` (as the weights are), `bf16`, `f16` or `f32`.
        pre: llama.cpp's name for the way that the tokenizer splits, instead of recognising it.
        loras: adapters that are merged into the weights.
        threads: defaults to the cores at hand.
        progress: called with (weights done, weights in all, tensor's name).
        arrivals: brings the model's files one after the other.

    Raises:
        LocalmixError: see `sources.open`, `plan` and `stream`.
    """
    threads = threads or default_threads()
    with open_source(model, pre=pre, loras=loras) as source:
        plan = plan_conversion(source, kind)
        write_outputs(source, [(plan, output)], threads=threads, progress=progress, arrivals=arrivals)
        return Converted(
            output,
            source.architecture,
            len(plan.tensors),
            plan.parameters,
            plan.file_bytes,
            plan.type,
            tuple(source.notes),
        )


def describe(path: Path) -> Converted:
    """A GGUF file that another program converted."""
    with open_source(path) as source:
        parameters, kind = source.parameters, weight_type(source)
        return Converted(
            path, source.architecture, len(source.tensors), parameters, path.stat().st_size, kind, tuple(source.notes)
        )
