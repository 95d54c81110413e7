"""Optimizer: from a source and target sizes to mixtures, with what is known of the model: measured, or priors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localmix.importance import Importance
from localmix.optimization.choice import Chooser, Chosen, Rated
from localmix.optimization.freedom import Freedom, Terms
from localmix.optimization.sampled_error import Errors, Progress, can_hold, relative_errors
from localmix.optimization.sensitivities import Sensitivities, prior_errors, read_sensitivities, shipped_priors
from localmix.optimization.target import Target
from localmix.plan import check_quantizable
from localmix.presets import Preset, load_presets
from localmix.sources.base import Source
from localmix.sources.positional import is_stand_in
from localmix.tensor_types import TensorType


@dataclass(frozen=True)
class Request:
    """How mixtures are to be chosen.

    Attributes:
        terms: what is fixed.
        sensitivities: a file of `localmix sensitivity`; None for the priors.
        seconds: of one weight in generation, by type, as `type_speed` measures it: then no mixture is slower than the
            best K-quant preset of at most its size.
    """

    terms: Terms = field(default_factory=Terms)
    sensitivities: Path | None = None
    seconds: Mapping[TensorType, float] | None = None


@dataclass(frozen=True)
class Optimized:
    """Mixtures, and what they were chosen by.

    Attributes:
        mixtures: one for each target.
        presets: those that the model can have, by the same measure, from the largest on.
        sensitivities: where they are from, for people.
        errors: the same of the relative errors.
        notes: sentences on what is unusual.
    """

    mixtures: tuple[Chosen, ...]
    presets: tuple[Rated, ...]
    sensitivities: str
    errors: str
    notes: tuple[str, ...]


def optimize(
    source: Source,
    targets: Sequence[Target],
    request: Request | None = None,
    *,
    importance: Importance | None = None,
    has_imatrix: bool = False,
    split_bytes: int | None = None,
    allow_requantize: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> Optimized:
    """Choose a mixture for each target.

    Args:
        source: its weights are sampled if they are here.
        importance: the importance matrix, if it is at hand.
        has_imatrix: there will be one.
        split_bytes, allow_requantize: as of `quantize`.
        threads: tensors that are sampled at once.
        progress: called with (weights sampled, weights in all, tensor's name).

    Raises:
        InputError: a file of sensitivities is broken or of another model, the importance matrix is of another model,
            the source is quantized already, or a sampled weight is not finite.
        UsageError: a target is out of reach, or a rule or minimum is wrong.
    """
    request = request or Request()
    freedom = Freedom(source, request.terms, importance=importance, has_imatrix=has_imatrix, split_bytes=split_bytes)
    if not allow_requantize:
        check_quantizable(freedom.plan(Preset("Q4_0", "Q4_0", pure=True)), source)
    sensitivities = _sensitivities(freedom, request.sensitivities)
    if weights_are_here(source):
        told = "sampled from the weights"
        told += f" with the importance matrix {importance.path}" if importance is not None else ""
        errors: Errors = relative_errors(
            source,
            freedom.wanted_types,
            importance,
            tensors=freedom.quantizable,
            threads=threads,
            progress=progress,
        )
    else:
        told = "those of a typical matrix, because the weights are not here"
        errors = typical_errors(freedom, importance)
    chooser = Chooser(freedom, load_presets(), errors, sensitivities, request.seconds)
    chosen = tuple(chooser.choose(target) for target in targets)
    notes = [*freedom.notes(), *(note for mixture in chosen for note in mixture.notes)]
    unknown = sensitivities.unknown(tensor.name for tensor in freedom.quantizable)
    if unknown and request.sensitivities is not None:
        notes.append(f"{request.sensitivities} says nothing of {', '.join(unknown)}: others stand in.")
    return Optimized(chosen, tuple(chooser.rated), sensitivities.origin, told, tuple(notes))


def weights_are_here(source: Source) -> bool:
    """Whether weights can be read now: not of a model without them, nor of one that comes from the hub."""
    files = source.files()
    return bool(files) and not any(is_stand_in(path) for path in files)


def typical_errors(freedom: Freedom, importance: Importance | None = None) -> dict[str, dict[TensorType, float]]:
    """The relative errors of types in a typical matrix, for the types that each tensor can hold."""
    typical = prior_errors()
    found: dict[str, dict[TensorType, float]] = {}
    for tensor in freedom.quantizable:
        if importance is not None:
            weighted = importance.rows(tensor) is not None
        else:
            weighted = freedom.has_imatrix and tensor.name.startswith("blk.")
        found[tensor.name] = {
            kind: error for kind, error in typical.items() if can_hold(tensor, kind, has_importance=weighted)
        }
    return found


def _sensitivities(freedom: Freedom, path: Path | None) -> Sensitivities:
    if path is None:
        return shipped_priors(tensor.name for tensor in freedom.quantizable)
    source = freedom.source
    return read_sensitivities(path, source.architecture, source.number("{arch}.block_count"))
