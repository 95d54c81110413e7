"""quantize: one read of a model becomes one file for each type."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.errors import UsageError
from localmix.gguf_format import ALIGNMENT, DEFAULT_ALIGNMENT
from localmix.importance import Importance, load_importance
from localmix.native.devices import default_threads
from localmix.optimization.choice import Chosen, Rated
from localmix.optimization.optimizer import Optimized, Request, optimize
from localmix.optimization.target import Target
from localmix.plan import Plan, Planner, check_coverage, check_importance, check_quantizable, check_rules, check_split
from localmix.presets import Preset, Rule, tensor_type
from localmix.sources.adapter import Lora
from localmix.sources.base import MetaValue, Source, boolean, f32, text, u32
from localmix.sources.open import open_source
from localmix.stream import Progress, write_outputs

if TYPE_CHECKING:
    from localmix.downloads.arrivals import Arrivals

LARGEST_F32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class OutputSummary:
    """One finished (or, in a dry run, planned) file.

    Attributes:
        path: the file, or the first of its parts when the output is split.
        parts: all files.
        bpw: mean bits of a weight.
        fallbacks: tensors whose columns fit no block of the type that was meant, as `NAME: MEANT -> TYPE`.
        mixture: of an output that was made for a target, how its types were chosen.
    """

    path: Path
    parts: tuple[Path, ...]
    type: str
    bytes: int
    bpw: float
    fallbacks: tuple[str, ...]
    mixture: MixtureSummary | None = None


@dataclass(frozen=True)
class MixtureSummary:
    """How the types of an output were chosen.

    Attributes:
        damage: expected divergence from the original, in nats a token.
        best_preset: the best preset of at most the target's size, by the same measure; None if none is so small.
        sensitivities, errors: where they are from.
        preset: with the types, to be applied again.
    """

    damage: float
    best_preset: Rated | None
    sensitivities: str
    errors: str
    preset: Preset


@dataclass(frozen=True)
class Quantized:
    """What a run of `quantize` made, and what it knew of which weights matter."""

    outputs: tuple[OutputSummary, ...]
    seconds: float
    notes: tuple[str, ...]
    importance: Importance | None


def parse_rule(spec: str) -> Rule:
    """`PATTERN=TYPE` as a rule.

    Raises:
        UsageError: there is no `=`, or the type does not exist.
    """
    pattern, sign, kind = spec.rpartition("=")
    if not (pattern and sign):
        raise UsageError(f"{spec!r} is no tensor rule.", "Write PATTERN=TYPE, such as attn_v=Q6_K.")
    return Rule(pattern, tensor_type(kind))


def _integer(value: str) -> MetaValue:
    number = int(value)
    if not 0 <= number < 1 << 32:  # llama-quantize keeps 32 unsigned bits too, and wraps others around
        raise UsageError(f"{value} is no number from 0 to {(1 << 32) - 1}, which is what an int entry holds.")
    return u32(number)


def _real(value: str) -> MetaValue:
    number = float(value)
    if not abs(number) <= LARGEST_F32:  # NaN neither
        raise UsageError(f"{value} is no number from -{LARGEST_F32:.4g} to {LARGEST_F32:.4g}, of 32 bits.")
    return f32(number)


_OVERRIDES: Mapping[str, Callable[[str], MetaValue]] = {
    "int": _integer,
    "float": _real,
    "bool": lambda value: boolean({"true": True, "false": False}[value.lower()]),
    "str": text,
}


def parse_override(spec: str) -> tuple[str, MetaValue]:
    """`KEY=TYPE:VALUE` as a metadata entry, with the types `llama-quantize` knows.

    Raises:
        UsageError: the form or the type is wrong, or the value is none of that type.
    """
    key, _, typed = spec.partition("=")
    kind, colon, value = typed.partition(":")
    if not key or not colon or kind not in _OVERRIDES:
        raise UsageError(
            f"{spec!r} is no metadata entry.",
            f"Write KEY=TYPE:VALUE with a type of {', '.join(_OVERRIDES)}, such as llama.context_length=int:8192.",
        )
    if key == ALIGNMENT:
        raise UsageError(f"{ALIGNMENT} cannot be set: tensors always start at multiples of {DEFAULT_ALIGNMENT} bytes.")
    try:
        return key, _OVERRIDES[kind](value)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{value!r} is no {kind}, in {spec!r}.") from error


def plan_outputs(
    source: Source,
    presets: Sequence[Preset],
    importance: Importance | None = None,
    rules: Sequence[Rule] = (),
    *,
    split_bytes: int | None = None,
    allow_requantize: bool = False,
) -> tuple[list[Plan], list[str]]:
    """Plan every output and refuse what cannot end well, before any weight is read.

    Returns:
        The plans, and sentences on what is unusual.

    Raises:
        InputError: the source is quantized already, the importance matrix is of another model, or a type needs
            an importance row that is missing.
        UsageError: a rule matches no tensor, or the parts are far too small.
    """
    planner = Planner(source)
    plans = [planner.plan(preset, rules=rules, importance=importance, split_bytes=split_bytes) for preset in presets]
    notes: list[str] = []
    for plan in plans:
        if not allow_requantize:
            check_quantizable(plan, source)
        notes += check_rules(plan, rules)
        if split_bytes is not None:
            notes += check_split(plan, split_bytes)
        if importance is not None:
            notes += check_coverage(plan, importance)
        check_importance(plan, importance)
    return plans, list(dict.fromkeys(notes))  # several types often share one


def coverage_notes(importance: Importance) -> list[str]:
    """Sentences about experts that the calibration text never reached."""
    instead = "every column counts the same" if importance.fill_with_ones else "the mean of the other experts is used"
    notes = []
    layers: dict[int, list[int]] = {}
    for layer, expert in importance.coverage.unreached:
        layers.setdefault(layer, []).append(expert)
    for layer, experts in layers.items():
        names = sorted(name for name in importance.entries if name.startswith(f"blk.{layer}.") and "_exps" in name)
        notes.append(
            f"Layer {layer}: no calibration token reached expert {', '.join(map(str, experts))}, so {instead}"
            f" in {', '.join(names)}. A longer calibration text helps."
        )
    return notes


def quantize(
    model: Path,
    outputs: Sequence[tuple[Preset | Target, Path]],
    *,
    imatrix: Path | None = None,
    rules: Sequence[Rule] = (),
    request: Request | None = None,
    overrides: Sequence[tuple[str, MetaValue]] = (),
    split_bytes: int | None = None,
    allow_requantize: bool = False,
    upstream_imatrix: bool = False,
    loras: Sequence[Lora] = (),
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    arrivals: Arrivals | None = None,
) -> Quantized:
    """Quantize a checkpoint or a BF16, F16 or F32 GGUF file to one or more types in one pass.

    Args:
        model: checkpoint folder or GGUF file.
        outputs: presets, or targets for which mixtures are chosen, each with the file to write.
        imatrix: the importance matrix, used for every type that can.
        rules: types for tensors by name, before the preset's own.
        request: how mixtures are chosen; the rules go before what it fixes.
        overrides: metadata entries to set or replace.
        split_bytes: put no more than this into one file; parts get llama.cpp's names.
        allow_requantize: take a source that is already quantized.
        upstream_imatrix: give experts that no calibration token reached llama.cpp's weights of one.
        loras: adapters that are merged into a checkpoint's weights.
        threads: defaults to the cores at hand.
        dry_run: plan and check only.
        progress: called with (weights done, weights in all, tensor's name).
        arrivals: brings the model's files one after the other.

    Raises:
        LocalmixError: see `sources.open`, `plan`, `importance` and `stream`.
    """
    started = time.monotonic()
    with open_source(model, loras=loras) as source:
        source.metadata = {**source.metadata, **dict(overrides)}
        importance = None
        if imatrix is not None:
            importance = replace(load_importance(imatrix), fill_with_ones=upstream_imatrix)
        targets = [wanted for wanted, _ in outputs if isinstance(wanted, Target)]
        found = None
        if targets:
            request = request or Request()
            terms = replace(request.terms, rules=(*rules, *request.terms.rules))
            found = optimize(
                source,
                targets,
                replace(request, terms=terms),
                importance=importance,
                split_bytes=split_bytes,
                allow_requantize=allow_requantize,
                threads=threads or default_threads(),
                progress=progress,
            )
        mixtures = dict(zip(targets, found.mixtures, strict=True)) if found else {}
        presets = [mixtures[wanted].preset if isinstance(wanted, Target) else wanted for wanted, _ in outputs]
        plans, unusual = plan_outputs(
            source,
            presets,
            importance,
            rules,
            split_bytes=split_bytes,
            allow_requantize=allow_requantize,
        )
        paths = [path for _, path in outputs]
        notes = [*source.notes, *unusual, *(coverage_notes(importance) if importance else ())]
        notes += found.notes if found else ()
        if not dry_run:
            write_outputs(
                source,
                list(zip(plans, paths, strict=True)),
                importance,
                threads=threads or default_threads(),
                progress=progress,
                arrivals=arrivals,
            )
    summaries = tuple(
        _summary(plan, path, _describe(mixtures[wanted], found) if found and isinstance(wanted, Target) else None)
        for plan, (wanted, path) in zip(plans, outputs, strict=True)
    )
    return Quantized(summaries, time.monotonic() - started, tuple(notes), importance)


def _summary(plan: Plan, path: Path, mixture: MixtureSummary | None) -> OutputSummary:
    parts = plan.paths(path)
    fallbacks = _describe_fallbacks(plan)
    return OutputSummary(parts[0], parts, plan.type, plan.file_bytes, plan.bits_per_weight, fallbacks, mixture)


def _describe(chosen: Chosen, found: Optimized) -> MixtureSummary:
    return MixtureSummary(chosen.rated.damage, chosen.best_preset, found.sensitivities, found.errors, chosen.preset)


def _describe_fallbacks(plan: Plan) -> tuple[str, ...]:
    return tuple(
        f"{tensor.info.name}: {tensor.meant.name} -> {tensor.type.name}"
        for tensor in plan.fallbacks
        if tensor.meant is not None
    )
