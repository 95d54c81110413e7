"""What the plots of a report show: points, axes, the Pareto front, the line at 16 GiB, and what to say about them.

`svg` draws charts for a page and `plots` with matplotlib; all that can be decided without drawing is decided here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from localmix.presentation.table import ContextPoint, QuantizationRow, comparable
from localmix.sizes import GIB, size, size_unit

# the memory of the machine that the 16 GB line stands for
LIMIT_BYTES = 16 * GIB
LIMIT_TITLE = "16 GiB"

# beyond this ratio of largest to smallest an axis is logarithmic
LOG_RATIO = 3.0
_MARGIN = 0.07
_ORIGINS = ("measured", "published")


@dataclass(frozen=True)
class Mark:
    """One point of a chart.

    Attributes:
        error: half the length of its error bar; None without one.
        label: what stands beside it.
        details: lines that say all about it.
        on_front: no other point is both smaller and better.
    """

    x: float
    y: float
    error: float | None
    label: str
    details: tuple[str, ...]
    on_front: bool = False


@dataclass(frozen=True)
class Series:
    """Points that belong together; `published` ones are drawn hollow, `joined` ones with a line through them."""

    title: str
    marks: tuple[Mark, ...]
    published: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, with (value, text) for each of its ticks."""

    title: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Where a value stands: 0 at `low`, 1 at `high`."""
        if self.log:
            low = math.log(self.low)
            return (math.log(max(value, self.low)) - low) / (math.log(self.high) - low)
        return (value - self.low) / (self.high - self.low)

    def error_bar(self, mark: Mark) -> tuple[float, ...]:
        """Both ends of a mark's error bar, cut where the axis ends; nothing without an error."""
        if not mark.error:
            return ()
        return max(mark.y - mark.error, self.low), min(mark.y + mark.error, self.high)


@dataclass(frozen=True)
class Chart:
    """A picture to draw.

    Attributes:
        name: short, of lower-case letters and hyphens.
        caption: what is seen, in sentences.
        fronts: the Pareto fronts, each as its points (x, y) from small to large.
        limit: where on the x axis the line of 16 GiB stands; None when that is far from the points.
        labelled: the marks have their labels beside them.
    """

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    fronts: tuple[tuple[tuple[float, float], ...], ...] = ()
    limit: float | None = None
    labelled: bool = True

    def aside(self, index: int) -> float:
        """Pixels by which a series is moved to the right, so that error bars at one place stand side by side."""
        joined = sum(part.joined for part in self.series)
        return (index - (joined - 1) / 2) * min(5.0, 20.0 / joined) if joined else 0.0


def charts(rows: Sequence[QuantizationRow], points: Sequence[ContextPoint]) -> list[Chart]:
    """The charts for which there is something to draw: perplexity, divergence and speed over size, and over context.

    Published figures share a chart with measured ones where their sizes overlap, else they have their own:
    an 11 GiB model beside one of 3 MiB would press it flat.
    """
    groups = _groups([row for row in rows if not row.failed])
    found = [_over_size(group, measure) for measure in _MEASURES for group in groups]
    found += [_over_context([point for point in points if point.origin == origin]) for origin in _ORIGINS]
    return [chart for chart in found if chart is not None]


def _groups(rows: Sequence[QuantizationRow]) -> list[list[QuantizationRow]]:
    """Measured and published rows: together when their sizes overlap, else apart."""
    measured = [row for row in rows if row.origin == "measured"]
    published = [row for row in rows if row.origin != "measured"]
    if not measured or not published:
        return [list(rows)] if rows else []
    ranges = [(min(row.bytes for row in part), max(row.bytes for row in part)) for part in (measured, published)]
    overlap = max(low for low, _ in ranges) <= min(high for _, high in ranges)
    return [[*measured, *published]] if overlap else [measured, published]


# a value of a row, its error, and the device it was measured on where a row has several
_Value = tuple[float, float | None, str]


def _perplexities(row: QuantizationRow) -> list[_Value]:
    return [] if row.ppl is None else [(row.ppl, row.error, "")]


def _divergences(row: QuantizationRow) -> list[_Value]:
    found = row.divergence
    return [] if found is None or not found.mean > 0 or row.is_reference else [(found.mean, found.error, "")]


def _speeds(row: QuantizationRow) -> list[_Value]:
    values: list[_Value] = [(1000 / value, None, device) for device, value in row.device_ms_per_token.items() if value]
    if row.tg_tps:
        values.append((row.tg_tps, None, ""))
    elif row.ms_per_token:
        values.append((1000 / row.ms_per_token, None, ""))
    return values


@dataclass(frozen=True)
class _Measure:
    """What can be drawn over the size.

    Attributes:
        axis: title of the y axis; its first words name the value of a mark.
        of_text: the value depends on the text, and less of it is better: there is a Pareto front for each text.
        log: as in `axis`.
    """

    name: str
    title: str
    axis: str
    values: Callable[[QuantizationRow], list[_Value]]
    of_text: bool = True
    log: bool | None = None


_MEASURES = (
    _Measure("ppl", "Perplexity over size", "Perplexity", _perplexities),
    _Measure("kld", "Divergence from the reference over size", "KL divergence, nats per token", _divergences, log=True),
    _Measure("speed", "Generation speed over size", "Tokens per second", _speeds, of_text=False),
)


def _over_size(rows: Sequence[QuantizationRow], measure: _Measure) -> Chart | None:
    found = [(row, value) for row in rows for value in measure.values(row) if math.isfinite(value[0])]
    if not measure.of_text:  # a model has it once, however many texts it was measured on
        found = list({(row.title, row.type, row.bytes, value): (row, value) for row, value in found}.values())
    if len({(row.bytes, value[0]) for row, value in found}) < 2:
        return None
    unit, unit_name = size_unit(row.bytes for row, _ in found)
    fronts: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {}
    if measure.of_text:
        for key in dict.fromkeys(comparable(row) for row, _ in found):
            fronts[key] = pareto((row.bytes / unit, value[0]) for row, value in found if comparable(row) == key)
    several_models = len({row.title for row, _ in found}) > 1
    several_texts = measure.of_text and len({row.corpus for row, _ in found}) > 1
    grouped: dict[tuple[str, str, str], list[Mark]] = {}
    published: set[tuple[str, str, str]] = set()
    for row, value in found:
        key_of_series = (row.title, row.corpus if several_texts else "", value[2])
        if row.origin == "published":
            published.add(key_of_series)
        place = row.bytes / unit, value[0]
        details = _details(row, value, measure)
        mark = Mark(*place, _finite(value[1]), row.type, details, place in fronts.get(comparable(row), ()))
        grouped.setdefault(key_of_series, []).append(mark)
    series = tuple(
        Series(_series_title(*key, several_models or key in published), tuple(marks), key in published)
        for key, marks in grouped.items()
    )
    marks = [mark for part in series for mark in part.marks]
    limit, limit_words = _limit([mark.x for mark in marks], unit)
    ends = [mark.y + (mark.error or 0) for mark in marks]
    # on a scale without a zero the lower ends of the bars are cut
    ends += [mark.y - (0 if measure.log else mark.error or 0) for mark in marks]
    y = axis(measure.axis, ends, measure.log)
    drawn = tuple(front for front in fronts.values() if len(front) > 1)
    words = [_better(measure, drawn, y), _hollow(series), limit_words]
    if measure.name == "kld" and any(row.is_reference for row in rows):
        words.insert(1, "The reference itself, at 0, is below the scale.")
    all_published = len(published) == len(series)
    return Chart(
        name=measure.name + ("-published" if all_published else ""),
        title=measure.title + (", as published" if all_published else ""),
        caption=" ".join(filter(None, words)),
        x=axis(f"File size, {unit_name}", [*(mark.x for mark in marks), *([] if limit is None else [limit])]),
        y=y,
        series=series,
        fronts=drawn,
        limit=limit,
    )


def _details(row: QuantizationRow, value: _Value, measure: _Measure) -> tuple[str, ...]:
    amount, error, device = value
    text = f"{measure.axis.split(',')[0]} {_precise(amount)}" + (f" ± {_precise(error, amount)}" if error else "")
    return (
        f"{row.title} {row.type}",
        size(row.bytes) + (f" · {row.bpw:.2f} BPW" if row.bpw is not None else ""),
        f"{text} · {device}" if device else text,
        *((row.corpus,) if row.corpus and measure.of_text else ()),
    )


def _series_title(model: str, text: str, device: str, with_model: bool) -> str:
    return ", ".join(filter(None, (model if with_model or not (text or device) else "", text, device)))


def _better(measure: _Measure, fronts: Sequence[object], y: Axis) -> str:
    if not measure.of_text:
        return "Higher is faster."
    words = f"Lower is better{'; the scale is logarithmic' if y.log else ''}."
    if fronts:
        words += " The dashed line is the Pareto front: for each file on it, no smaller one is as good."
    return words


def _hollow(series: Sequence[Series]) -> str:
    return "Hollow marks are published figures, not measured here." if any(part.published for part in series) else ""


def _limit(xs: Sequence[float], unit: int) -> tuple[float | None, str]:
    """Where 16 GiB stand on the axis, or why they do not."""
    limit = LIMIT_BYTES / unit
    if min(xs) / 1.5 <= limit <= max(xs) * 1.5:
        return limit, f"The vertical line is {LIMIT_TITLE}."
    side = "smaller" if limit > max(xs) else "larger"
    return None, f"All of these files are much {side} than {LIMIT_TITLE}: that line is not on this scale."


def _over_context(points: Sequence[ContextPoint]) -> Chart | None:
    shown = [point for point in points if math.isfinite(point.ppl)]
    if len({point.context for point in shown}) < 2:
        return None
    several_texts = len({point.corpus for point in shown}) > 1
    mixed = len({point.paired for point in shown}) > 1
    grouped: dict[str, list[ContextPoint]] = {}
    for point in sorted(shown, key=lambda point: point.context):
        title = f"{point.model} {point.type}" + (" (published)" if point.origin == "published" else "")
        title += f", {point.corpus}" if several_texts else ""
        title += (", the same tokens" if point.paired else ", each context's own tokens") if mixed else ""
        grouped.setdefault(title, []).append(point)
    series = tuple(
        Series(
            title,
            tuple(
                Mark(
                    point.context,
                    point.ppl,
                    _finite(point.error),
                    context_text(point.context),
                    (
                        title,
                        f"Context {point.context:,}",
                        f"Perplexity {_precise(point.ppl)}"
                        + (f" ± {_precise(point.error, point.ppl)}" if point.error else ""),
                        *((f"{point.tokens:,} tokens in {point.chunks:,} chunks",) if point.tokens else ()),
                    ),
                )
                for point in curve
            ),
            published=curve[0].origin == "published",
            joined=True,
        )
        for title, curve in grouped.items()
    )
    words = ["Lower is better; the bars are standard errors." if any(p.error for p in shown) else "Lower is better."]
    if all(point.paired for point in shown):
        words.append("Every context scores the same tokens: differences along a curve are surer than the bars.")
    elif not mixed:
        words.append("Each context scores tokens of its own.")
    words.append(_hollow(series))
    contexts = sorted({point.context for point in shown})
    ticks = [2**power for power in range(contexts[0].bit_length() - 1, contexts[-1].bit_length() + 1)]
    ticks = [tick for tick in ticks if contexts[0] <= tick <= contexts[-1]]
    if len(ticks) < 2:
        ticks = contexts
    low, high = _padded(contexts[0], contexts[-1], log=True)
    ys = [point.ppl + sign * (_finite(point.error) or 0) for point in shown for sign in (-1, 1)]
    return Chart(
        name="context" + ("-published" if shown[0].origin == "published" else ""),
        title="Perplexity over context" + (", as published" if shown[0].origin == "published" else ""),
        caption=" ".join(filter(None, words)),
        x=Axis("Context, tokens", low, high, True, tuple((tick, context_text(tick)) for tick in ticks)),
        y=axis("Perplexity", ys),
        series=series,
        labelled=False,
    )


def context_text(context: int) -> str:
    """A number of tokens as people say it: 4K for 4096."""
    return f"{context // 1024}K" if context >= 1024 and context % 1024 == 0 else f"{context:,}"


def pareto(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points (x, y) for which no other has both x and y as small or smaller, from small x to large."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return tuple(front)


def axis(title: str, values: Sequence[float], log: bool | None = None) -> Axis:
    """An axis on which the values have room; logarithmic when they span enough for that, unless `log` says."""
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and high / low > LOG_RATIO
    low, high = _padded(low, high, log)
    places = _log_ticks(low, high) if log else _linear_ticks(low, high)
    return Axis(title, low, high, log, tuple((place, _tick_text(place)) for place in places))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        ratio = math.exp((math.log(high) - math.log(low)) * _MARGIN) if high > low else 1.5
        return max(low / ratio, sys.float_info.min), min(high * ratio, sys.float_info.max)
    room = (high - low) * _MARGIN if high > low else max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to nine of them."""
    raw = (high - low) / 6
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


# of one decade, from few ticks to many
_LOG_STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _LOG_STEPS:
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks if len(ticks) > 1 else _linear_ticks(low, high)


def _tick_text(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value:.3g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _precise(value: float, like: float | None = None) -> str:
    """Four digits after the point, more for what is small; an error as many as the value it belongs to."""
    size_of = abs(value if like is None else like)
    return (
        f"{value:.4g}"
        if size_of >= 1e7
        else f"{value:.1f}"
        if size_of >= 100
        else f"{value:.4f}"
        if size_of >= 0.1
        else f"{value:.6f}"
    )
