"""The quantization table: several models measured on one corpus, a row for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from localmix import library
from localmix.errors import Interrupted, LocalmixError
from localmix.gguf_format import tensor_bytes
from localmix.memory import DEFAULT_CONTEXT, trained_context
from localmix.native.mixture import file_type
from localmix.perplexity import Perplexity, measure
from localmix.plan import COPY
from localmix.presets import load_presets
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.table import QuantizationRow


@dataclass(frozen=True)
class Subject:
    """A model to measure: what its row says without measuring."""

    path: Path
    model: str
    type: str
    bytes: int
    bpw: float
    trained_context: int


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
    corpus: Path,
    ctx: int,
    chunks: int | None = None,
    threads: int | None = None,
    speed: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[Measured]:
    """Measure each model; a row comes as soon as it is done.

    A model that fails becomes a row that says so and the others go on, unless it is the only one.

    Args:
        subjects: from `look_at`.
        corpus: a UTF-8 text.
        ctx, chunks, threads, speed: as `perplexity.measure`.
        progress: called with (done, in all, the model's type and number and what is counted).

    Raises:
        LocalmixError: the only model failed.
    """
    for number, subject in enumerate(subjects, 1):
        label = f"{subject.type} ({number} of {len(subjects)})" if len(subjects) > 1 else subject.type

        def report(done: int, total: int, what: str, label: str = label) -> None:
            if progress is not None:
                progress(done, total, f"{label}: {what}")

        try:
            found = measure(subject.path, corpus, ctx, chunks, threads, speed, report)
        except Interrupted:
            raise
        except LocalmixError as error:
            if len(subjects) == 1:
                raise
            yield Measured(_row(subject, failure=error.message), None)
        else:
            yield Measured(_row(subject, found), found)


def _row(subject: Subject, found: Perplexity | None = None, failure: str = "") -> QuantizationRow:
    return QuantizationRow(
        model=subject.model,
        type=subject.type,
        path=subject.path,
        bytes=subject.bytes,
        bpw=subject.bpw,
        ppl=found.ppl if found else None,
        error=found.error if found else None,
        tokens=found.tokens if found else 0,
        chunks=found.chunks if found else 0,
        prompt_ms_per_token=found.prompt_ms_per_token if found else None,
        ms_per_token=found.speed.ms_per_token if found and found.speed else None,
        failure=failure,
    )
