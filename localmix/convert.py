"""convert: a checkpoint becomes one GGUF file with the weights as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import InputError, UsageError
from localmix.native.devices import default_threads
from localmix.plan import Plan, Planner, check_quantizable
from localmix.presets import load_presets
from localmix.sources.adapter import Lora
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.stream import Progress, write_outputs
from localmix.tensor_types import FLOAT_TYPES

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
    weights: Counter[str] = Counter()
    for tensor in source.tensors:
        weights[tensor.type.name] += tensor.elements
    name = weights.most_common(1)[0][0]
    if name not in {kind.name for kind in FLOAT_TYPES}:
        raise InputError(f"{source.path} is already quantized ({name}).", "Convert the checkpoint it came from.")
    return name


def plan_conversion(source: Source, kind: str = "auto") -> Plan:
    """The plan of `convert`: `auto` keeps the type the weights have, so nothing is lost.

    Raises:
        UsageError: the type is not one of `TYPES`.
        InputError: the source is quantized, or llama.cpp does not know the model.
    """
    if kind.lower() not in TYPES:
        raise UsageError(f"{kind!r} is no type to convert to.", f"One of {', '.join(TYPES)}.")
    name = weight_type(source) if kind.lower() == "auto" else kind.upper()
    plan = Planner(source).plan(load_presets().find(name))
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

    Raises:
        LocalmixError: see `sources.open`, `plan` and `stream`.
    """
    with open_source(model, pre=pre, loras=loras) as source:
        plan = plan_conversion(source, kind)
        write_outputs(source, [(plan, output)], threads=threads or default_threads(), progress=progress)
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
