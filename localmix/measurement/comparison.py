"""The quantization table: several models measured on one corpus, a row for each; and the verdict on two."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix import library
from localmix.capacity.memory import DEFAULT_CONTEXT, trained_context
from localmix.errors import Interrupted, LocalmixError, NetworkError
from localmix.gguf_format import tensor_bytes
from localmix.measurement.corpus import Corpus
from localmix.measurement.divergence import Divergence, Reference, Run, open_reference
from localmix.measurement.measuring_child import MeasuringChild
from localmix.measurement.perplexity import BrokenReference, Conditions, Perplexity, measure_here
from localmix.measurement.reference import Cache
from localmix.native.devices import Placement
from localmix.native.mixture import file_type
from localmix.plan import COPY
from localmix.presentation.table import QuantizationRow
from localmix.presets import load_presets
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.worker import Report


@dataclass(frozen=True)
class Subject:
    """A model to measure: what its row says without measuring.

    Attributes:
        placement, repack: how this one is loaded, where it has its own way; see `perplexity.Conditions`.
        devices: what it is computed on beside the processor, in words.
    """

    path: Path
    model: str
    type: str
    bytes: int
    bpw: float
    trained_context: int
    placement: Placement | None = None
    repack: bool = True
    devices: tuple[str, ...] = ()

    def conditions(self, shared: Conditions) -> Conditions:
        """Those that all models share, with this one's own place."""
        return replace(shared, placement=self.placement or shared.placement, repack=self.repack and shared.repack)


@dataclass(frozen=True)
class Measured:
    """A finished row, and what was measured for it; None when that failed, `row.failure` says why."""

    row: QuantizationRow
    perplexity: Perplexity | None


def look_at(path: Path) -> Subject:
    """Open a GGUF file for its row of the table; costs milliseconds.

    Raises:
        LocalmixError: see `sources.open`.
    """
    with open_source(path) as source:
        return Subject(
            path=path,
            model=library.model_name(path),
            type=library.split_name(path)[1] or _type_inside(source),
            bytes=sum(file.stat().st_size for file in source.files()),
            bpw=sum(map(tensor_bytes, source.tensors)) * 8 / max(1, source.parameters),
            trained_context=trained_context(source),
        )


def _type_inside(source: Source) -> str:
    """The mixture that the file says it is, else the type of most of its weights."""
    number = source.get("general.file_type")
    for name, preset in load_presets().presets.items():
        # llama.cpp has no number for COPY, which is no mixture of its own
        if name == preset.base != COPY and file_type(name) == number:
            return name
    weights: Counter[str] = Counter()
    for tensor in source.tensors:
        weights[tensor.type.name] += tensor.elements
    return weights.most_common(1)[0][0] if weights else ""


def common_context(subjects: Sequence[Subject]) -> int:
    """The context to measure with when none is asked for: 4096, or what the shortest model was trained for."""
    return min(DEFAULT_CONTEXT, *(subject.trained_context for subject in subjects))


def compare(
    subjects: Sequence[Subject],
    corpus: Corpus,
    conditions: Conditions,
    speed: bool = True,
    reference: Subject | None = None,
    cache: Cache | None = None,
    progress: Report | None = None,
    child: MeasuringChild | None = None,
) -> Iterator[Measured]:
    """Measure each model; a row comes as soon as it is done, the reference's first.

    A model that fails becomes a row that says so and the others go on, unless it is the only one. When the
    reference fails, the others are measured without it.

    Args:
        subjects, reference: from `look_at`; a reference that is one of the subjects too has one row.
        speed: measure the generation speed too.
        cache: keep the reference's logits there; None to run it beside each model.
        progress: called with (done, in all, the model's type and number and what is counted).
        child: measures; None for one of its own.

    Raises:
        LocalmixError: the only model failed.
    """
    with contextlib.ExitStack() as stack:
        run = (child or stack.enter_context(MeasuringChild())).run
        if reference is None:
            yield from _compare_alone(subjects, corpus, conditions, speed, _reports(subjects, progress, speed), run)
        else:
            yield from _compare_with(reference, subjects, corpus, conditions, speed, cache, progress, run)


def _compare_with(
    reference: Subject,
    subjects: Sequence[Subject],
    corpus: Corpus,
    conditions: Conditions,
    speed: bool,
    cache: Cache | None,
    progress: Report | None,
    run: Run,
) -> Iterator[Measured]:
    # a reference alone is measured against itself
    others = [subject for subject in subjects if not subject.path.samefile(reference.path)] or list(subjects)
    reports = _reports([reference, *others], progress, speed)
    try:
        opened = open_reference(
            reference.path, corpus, reference.conditions(conditions), cache, speed, next(reports), run
        )
    except (Interrupted, NetworkError):
        raise
    except LocalmixError as error:
        yield _failed(reference, corpus, error, is_reference=True)
        yield from _compare_alone(others, corpus, conditions, speed, reports, run, may_raise=False)
        return
    if opened.perplexity is not None:
        yield _reference_row(reference, corpus, opened, opened.perplexity)
    for number, subject in enumerate(others):
        try:
            found, beside = opened.measure_both(subject.path, speed, next(reports), subject.conditions(conditions), run)
        except (Interrupted, NetworkError):
            raise
        except BrokenReference as error:
            yield _failed(reference, corpus, error, is_reference=True)
            again = _reports(others[number:], progress, speed, before=1 + number)
            yield from _compare_alone(others[number:], corpus, conditions, speed, again, run, may_raise=False)
            return
        except LocalmixError as error:
            yield _failed(subject, corpus, error)
            continue
        if opened.perplexity is None and beside is not None:
            opened = replace(opened, perplexity=beside)
            yield _reference_row(reference, corpus, opened, beside)
        yield Measured(_row(subject, corpus, found), found)
    if opened.perplexity is not None:
        return
    # it ran beside none of them
    last = _reports([reference], progress, speed)
    for alone in _compare_alone([reference], corpus, conditions, speed, last, run, may_raise=False):
        if alone.perplexity is None:
            yield replace(alone, row=replace(alone.row, is_reference=True))
        else:
            yield _reference_row(reference, corpus, opened, alone.perplexity)


def _compare_alone(
    subjects: Sequence[Subject],
    corpus: Corpus,
    conditions: Conditions,
    speed: bool,
    reports: Iterator[Report],
    run: Run,
    may_raise: bool = True,
) -> Iterator[Measured]:
    """Each model without a reference; a single one raises its error."""
    for subject in subjects:
        try:
            own = subject.conditions(conditions)
            found: Perplexity = run(measure_here, subject.path, corpus, own, speed, progress=next(reports))
        except (Interrupted, NetworkError):
            raise
        except LocalmixError as error:
            if may_raise and len(subjects) == 1:
                raise
            yield _failed(subject, corpus, error)
        else:
            yield Measured(_row(subject, corpus, found), found)


# Of a model's work: a text of usual length takes much longer than the speed.
_SPEED_SHARE = 0.1
_STEPS = 1000


def _reports(subjects: Sequence[Subject], progress: Report | None, speed: bool, before: int = 0) -> Iterator[Report]:
    """A `progress` for each of the models, which says whose it is and how far all of them are.

    Args:
        before: models of the same work that are done.
    """
    count = before + len(subjects)
    for number, subject in enumerate(subjects, before):
        name = f"{subject.type} ({number + 1} of {count})" if count > 1 else subject.type

        def report(done: int, total: int, what: str, number: int = number, name: str = name) -> None:
            if progress is None:
                return
            label = f"{name}: {what}"
            share = done / total if total else 0.0
            if what == "runs":
                share = 1 - _SPEED_SHARE * (1 - share)
            elif what != "chunks":  # another work's units
                progress(done, total, label)
                return
            elif speed:
                share *= 1 - _SPEED_SHARE
            progress(round(_STEPS * (number + share)), _STEPS * count, label)

        yield report


def _reference_row(subject: Subject, corpus: Corpus, opened: Reference, found: Perplexity) -> Measured:
    found = replace(found, notes=found.notes + opened.notes)
    return Measured(replace(_row(subject, corpus, found), is_reference=True), found)


def _failed(subject: Subject, corpus: Corpus, error: LocalmixError, is_reference: bool = False) -> Measured:
    return Measured(replace(_row(subject, corpus), failure=error.message, is_reference=is_reference), None)


def _row(subject: Subject, corpus: Corpus, found: Perplexity | None = None) -> QuantizationRow:
    row = QuantizationRow(
        model=subject.model,
        type=subject.type,
        path=subject.path,
        bytes=subject.bytes,
        bpw=subject.bpw,
        corpus=corpus.name,
    )
    if found is None:
        return row
    prompt = found.prompt_ms_per_token
    return replace(
        row,
        ppl=found.ppl,
        error=found.error,
        tokens=found.tokens,
        chunks=found.chunks,
        context=found.context,
        prompt_ms_per_token=prompt,
        pp_tps=1000 / prompt if prompt else None,
        ms_per_token=found.speed.ms_per_token if found.speed else None,
        tg_tps=found.speed.generation_tps if found.speed else None,
        memory_bytes=found.memory_bytes,
        delta_ppl=found.delta_ppl,
        delta_error=found.delta_error,
        divergence=found.divergence,
    )


def averages(rows: Sequence[QuantizationRow]) -> list[QuantizationRow]:
    """A row for each model measured on several corpora: every corpus counts the same, whatever its length.

    The perplexity is the geometric mean, which is the perplexity of the mean log-likelihoods. Divergences, shares and
    times are arithmetic means of the corpora's, the maximum and the memory are the largest. A model that failed on one
    has none.
    """
    names = list(dict.fromkeys(row.corpus for row in rows))
    groups: dict[Path | None, list[QuantizationRow]] = {}
    for row in rows:
        groups.setdefault(row.path, []).append(row)
    whole = {
        path: group
        for path, group in groups.items()
        if len(group) == len(names) and not any(row.failed for row in group)
    }
    reference = next((group for group in whole.values() if group[0].is_reference), None)
    return [_average(group, reference) for group in whole.values()]


def _average(rows: Sequence[QuantizationRow], reference: Sequence[QuantizationRow] | None) -> QuantizationRow:
    count = len(rows)
    ppls, errors = (np.array([getattr(row, name) for row in rows], float) for name in ("ppl", "error"))
    ppl = float(np.exp(np.log(ppls).mean()))
    # standard errors of the mean log-likelihoods, whose mean is that of the average
    deviations = errors / ppls
    times = [row.prompt_ms_per_token for row in rows if row.prompt_ms_per_token]
    prompt = statistics.fmean(times) if len(times) == count else None
    peaks = [row.memory_bytes for row in rows if row.memory_bytes is not None]
    average = replace(
        rows[0],
        corpus=f"average of {count}",
        ppl=ppl,
        error=ppl * float(np.sqrt((deviations**2).sum())) / count,
        tokens=sum(row.tokens for row in rows),
        chunks=sum(row.chunks for row in rows),
        prompt_ms_per_token=prompt,
        pp_tps=1000 / prompt if prompt else None,
        memory_bytes=max(peaks, default=None),
        delta_ppl=None,
        delta_error=None,
        divergence=None,
    )
    divergences = [row.divergence for row in rows if row.divergence is not None]
    if reference is None or len(divergences) < count:
        return average
    other_ppls, other_errors = (np.array([getattr(row, name) for row in reference], float) for name in ("ppl", "error"))
    other_ppl = float(np.exp(np.log(other_ppls).mean()))
    other_deviations = other_errors / other_ppls
    # each corpus's error of the difference holds the covariance of the two means
    differences = np.array([row.delta_error for row in rows], float)
    covariances = (errors**2 + other_errors**2 - differences**2) / (2 * ppls * other_ppls)
    variances = (ppl * deviations) ** 2 + (other_ppl * other_deviations) ** 2 - 2 * ppl * other_ppl * covariances
    return replace(
        average,
        delta_ppl=ppl - other_ppl,
        delta_error=float(np.sqrt(max(0.0, variances.sum()))) / count,
        divergence=Divergence(
            mean=statistics.fmean(item.mean for item in divergences),
            error=math.hypot(*(item.error for item in divergences)) / count,
            median=statistics.fmean(item.median for item in divergences),
            percentile_99=statistics.fmean(item.percentile_99 for item in divergences),
            maximum=max(item.maximum for item in divergences),
            same_top=statistics.fmean(item.same_top for item in divergences),
            same_top_error=math.hypot(*(item.same_top_error for item in divergences)) / count,
        ),
    )


# two standard errors: one in twenty such verdicts would be chance
_CERTAIN = 2


@dataclass(frozen=True)
class Verdict:
    """What a second model costs and saves against a first, on one text.

    Attributes:
        better: file name of the better one, by divergence from the reference where both have one, else by perplexity;
            empty if the difference is no larger than chance may make it.
        size_ratio: bytes of the second by those of the first.
        ppl_ratio, ppl_ratio_error: the same of the perplexities, with the error of the paired differences.
        kld_difference, kld_difference_error: mean divergence of the second less that of the first, in nats, with the
            error of the paired differences; None unless both are compared with a third model.
        sentence: all of it in words.
    """

    better: str
    size_ratio: float
    ppl_ratio: float
    ppl_ratio_error: float
    kld_difference: float | None
    kld_difference_error: float | None
    sentence: str


def judge(first: Measured, second: Measured) -> Verdict:
    """Compare two models that were measured on the same tokens; neither has failed."""
    assert first.perplexity is not None and second.perplexity is not None
    one, other = first.perplexity, second.perplexity
    difference, error = _paired(one.token_nll, other.token_nll)
    ratio = math.exp(difference)
    size_ratio = second.row.bytes / first.row.bytes
    alike = first.row.model == second.row.model and first.row.type != second.row.type
    names = (first.row.type, second.row.type) if alike else (one.model, other.model)
    divergence = divergence_error = None
    if one.divergence is not None and other.divergence is not None:
        divergence, divergence_error = _paired(one.token_divergence, other.token_divergence)
        decisive = abs(divergence) > _CERTAIN * divergence_error
        second_is_better = divergence < 0
        low, high = sorted((one.divergence.mean, other.divergence.mean))
        gain = f"its KLD is {100 * (1 - low / high):.1f} % lower" if high else ""
        figures = f"{low:.5f} against {high:.5f}, {abs(divergence):.5f} ± {divergence_error:.5f} less"
        unclear, value = "KLD", f"{divergence:+.5f} ± {divergence_error:.5f}"
    else:
        decisive = abs(difference) > _CERTAIN * error
        second_is_better = difference < 0
        # of the worse one's perplexity
        share = math.exp(-abs(difference))
        low, high = sorted((one.ppl, other.ppl))
        gain = f"its perplexity is {100 * (1 - share):.2f} ± {100 * share * error:.2f} % lower"
        figures = f"{low:.4f} against {high:.4f}"
        unclear, value = "perplexity", f"{100 * (ratio - 1):+.2f} ± {100 * ratio * error:.2f} %"
    if decisive:
        better, worse = reversed(names) if second_is_better else names
        size = _size(size_ratio if second_is_better else 1 / size_ratio)
        sentence = f"{better} is better than {worse}: {gain} ({figures}), and it is {size}."
    else:
        shows = f"This text shows no difference in {unclear} between {names[0]} and {names[1]} ({value})"
        sentence = f"{shows}; {names[1]} is {_size(size_ratio)}."
    return Verdict(
        better="" if not decisive else other.model if second_is_better else one.model,
        size_ratio=size_ratio,
        ppl_ratio=ratio,
        ppl_ratio_error=ratio * error,
        kld_difference=divergence,
        kld_difference_error=divergence_error,
        sentence=sentence,
    )


def _paired(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of the tokens' differences, and its standard error."""
    differences = second - first
    return float(differences.mean()), float(differences.std()) / math.sqrt(max(1, differences.size - 1))


def _size(ratio: float) -> str:
    """A size in words, by its ratio to the other."""
    if abs(ratio - 1) < 0.0005:
        return "as large"
    return f"{100 * abs(ratio - 1):.1f} % {'smaller' if ratio < 1 else 'larger'}"
