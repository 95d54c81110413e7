"""What the plots show: which points, on which scale, with which front, and labels that do not touch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmix.measurement.divergence import Divergence
from localmix.presentation.charts import Chart, axis, charts, context_text, pareto
from localmix.presentation.labels import chart_labels, place_labels, text_width
from localmix.presentation.published import find
from localmix.presentation.table import ContextPoint, QuantizationRow
from localmix.sizes import GIB, MIB

SIZES = [("BF16", 12.2, 1.7991), ("Q8_0", 6.52, 1.7999), ("Q5_0", 4.38, 1.8039), ("Q4_0", 3.71, 1.8184)]


def row(kind: str, mib: float, ppl: float | None, **values: object) -> QuantizationRow:
    fields: dict[str, object] = {"model": "tinymix", "path": Path("x"), "bpw": 4.5, "error": 0.002, "corpus": "a.txt"}
    return QuantizationRow(type=kind, bytes=int(mib * MIB), ppl=ppl, **(fields | values))  # type: ignore[arg-type]


def rows() -> list[QuantizationRow]:
    return [
        row(
            kind,
            mib,
            ppl,
            ms_per_token=mib / 40,
            is_reference=kind == "BF16",
            divergence=None if kind == "BF16" else Divergence(ppl - 1.799, 1e-4, 0, 0.1, 1, 0.9, 0.01),
        )
        for kind, mib, ppl in SIZES
    ]


def point(context: int, ppl: float, **values: object) -> ContextPoint:
    fields: dict[str, object] = {"error": 0.02, "tokens": 900, "chunks": 3, "paired": False}
    return ContextPoint("tinymix", "Q8_0", context, ppl=ppl, **(fields | values))  # type: ignore[arg-type]


def named(found: list[Chart]) -> dict[str, Chart]:
    return {chart.name: chart for chart in found}


def test_a_chart_for_each_thing_that_was_measured() -> None:
    found = named(charts(rows(), [point(128, 2.1), point(256, 1.9)]))
    assert list(found) == ["ppl", "kld", "speed", "context"]
    assert [mark.label for mark in found["ppl"].series[0].marks] == ["BF16", "Q8_0", "Q5_0", "Q4_0"]
    assert found["kld"].y.log
    assert [chart.aside(0) for chart in found.values()] == [0, 0, 0, 0]
    assert [mark.label for mark in found["kld"].series[0].marks] == ["Q8_0", "Q5_0", "Q4_0"]
    assert "reference itself" in found["kld"].caption
    assert [mark.y for mark in found["speed"].series[0].marks] == pytest.approx(
        [1000 * 40 / mib for _, mib, _ in SIZES]
    )


def test_nothing_to_draw() -> None:
    assert charts([], []) == []
    assert charts(rows()[:1], [point(128, 2.1)]) == []
    assert charts([row("Q8_0", 6, math.nan), row("Q4_0", 3, None, failure="broken"), rows()[0]], []) == []


def test_marks_tell_all_about_themselves() -> None:
    mark = named(charts(rows(), []))["ppl"].series[0].marks[1]
    assert mark.details == ("tinymix Q8_0", "6.52 MiB · 4.50 BPW", "Perplexity 1.7999 ± 0.0020", "a.txt")


def test_the_front_has_what_nothing_smaller_equals() -> None:
    worse = row("Q5_1", 5.0, 1.9)
    chart = named(charts([*rows(), worse], []))["ppl"]
    assert [mark.label for mark in chart.series[0].marks if not mark.on_front] == ["Q5_1"]
    (front,) = chart.fronts
    assert len(front) == 4
    assert list(front) == sorted(front)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_pareto_by_definition(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    for x, y in points:
        beaten = any((a <= x and b <= y) and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in front) == (not beaten)


def test_texts_have_fronts_of_their_own() -> None:
    other = [dataclasses.replace(one, corpus="b.txt", ppl=(one.ppl or 0) + 1) for one in rows()]
    chart = named(charts([*rows(), *other], []))["ppl"]
    assert [series.title for series in chart.series] == ["a.txt", "b.txt"]
    assert len(chart.fronts) == 2
    assert all(mark.on_front for series in chart.series for mark in series.marks)


def test_a_speed_is_shown_once_whatever_it_was_measured_on() -> None:
    average = [dataclasses.replace(one, corpus="average of 2") for one in rows()]
    chart = named(charts([*rows(), *average], []))["speed"]
    assert [len(series.marks) for series in chart.series] == [4]


def test_sixteen_gib_stand_where_sizes_are_near_and_are_told_where_not() -> None:
    tiny = named(charts(rows(), []))["ppl"]
    assert tiny.limit is None
    assert "much smaller than 16 GiB" in tiny.caption
    large = named(charts(find("chinese-mixtral").rows, []))["ppl-published"]
    assert large.limit == 16
    assert large.x.low < 16 < large.x.high
    assert "vertical line is 16 GiB" in large.caption
    far = [row("F32", 200 * 1024, 3.0), row("F16", 100 * 1024, 3.1)]
    assert "much larger than 16 GiB" in named(charts(far, []))["ppl"].caption


def test_published_rows_of_another_size_have_a_chart_of_their_own() -> None:
    table = find("chinese-mixtral")
    found = named(charts([*rows(), *table.rows], table.points))
    assert set(found) == {"ppl", "ppl-published", "kld", "speed", "speed-published", "context-published"}
    assert not any(series.published for series in found["ppl"].series)
    for name in ("ppl-published", "speed-published", "context-published"):
        assert all(series.published and "(published)" in series.title for series in found[name].series)
        assert "as published" in found[name].title
        assert "not measured here" in found[name].caption
    assert {series.title for series in found["speed-published"].series} == {
        "Chinese-Mixtral (published), M3 Max",
        "Chinese-Mixtral (published), A100",
    }


def test_published_rows_of_like_size_share_the_chart() -> None:
    measured = [row("Q8_0", 46 * 1024, 4.0), row("Q2_K", 16 * 1024, 4.9)]
    chart = named(charts([*measured, *find("chinese-mixtral").rows], []))["ppl"]
    assert [series.published for series in chart.series] == [False, True]
    assert len(chart.fronts) == 2


def test_the_context_curves_keep_tokens_and_texts_apart() -> None:
    points = [point(c, 2 - c / 4096, paired=paired) for paired in (False, True) for c in (256, 512, 1024)]
    chart = named(charts([], points))["context"]
    assert [series.title for series in chart.series] == [
        "tinymix Q8_0, each context's own tokens",
        "tinymix Q8_0, the same tokens",
    ]
    assert [text for _, text in chart.x.ticks] == ["256", "512", "1K"]
    assert chart.series[0].joined
    # their error bars stand side by side
    assert chart.aside(1) > 0
    assert chart.aside(0) == -chart.aside(1)
    assert chart.series[0].marks[0].details[-1] == "900 tokens in 3 chunks"


@pytest.mark.parametrize(("count", "words"), [(512, "512"), (4096, "4K"), (131072, "128K"), (5000, "5,000")])
def test_contexts_as_people_say_them(count: int, words: str) -> None:
    assert context_text(count) == words


@given(st.lists(st.floats(1e-7, 1e7), min_size=1, max_size=9), st.sampled_from([None, True, False]))
def test_axes_hold_their_values_and_have_ticks(values: list[float], log: bool | None) -> None:
    found = axis("x", values, log)
    assert all(0 <= found.place(value) <= 1 for value in values)
    assert 1 <= len(found.ticks) <= 30
    places = [found.place(value) for value, _ in found.ticks]
    assert places == sorted(set(places))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def test_an_error_bar_ends_with_the_axis() -> None:
    chart = named(charts([row("A", 1, 2.0, error=5.0), row("B", 2, 1.0)], []))["ppl"]
    log = axis("KLD", [1e-4, 1e-1], log=True)
    mark = dataclasses.replace(chart.series[0].marks[0], y=1e-4, error=1e-3)
    assert log.error_bar(mark)[0] == log.low
    assert log.error_bar(dataclasses.replace(mark, error=None)) == ()


@pytest.mark.parametrize(("ppl", "error"), [(1e300, 1e299), (2.0, math.nan), (2.0, math.inf), (1e-9, 1e9)])
def test_figures_of_a_broken_model_are_drawn_all_the_same(ppl: float, error: float) -> None:
    chart = named(
        charts([row("A", 1, ppl, error=error), row("B", 2, 1.5)], [point(128, ppl, error=error), point(256, 1)])
    )
    for found in chart.values():
        assert math.isfinite(found.y.low) and math.isfinite(found.y.high)
        assert all(0 <= found.y.place(mark.y) <= 1 for series in found.series for mark in series.marks)


def boxes(chart: Chart, width: float, height: float, font: float) -> list[tuple[float, float, float, float]]:
    found = chart_labels(chart, width, height, font)
    result = []
    for series, places in zip(chart.series, found.marks, strict=True):
        for mark, place in zip(series.marks, places, strict=True):
            if place is not None:
                half, high = text_width(mark.label, font) / 2, font * 1.25 / 2
                result.append((place.x - half, place.y - high, place.x + half, place.y + high))
    return result


@pytest.mark.parametrize(("width", "height"), [(580.0, 360.0), (290.0, 260.0)])
def test_no_label_touches_another_or_leaves_the_frame(width: float, height: float) -> None:
    measured = [row(kind, (gib + 0.3) * 1024, ppl) for kind, gib, ppl in (("Q4_K_M", 26.5, 4.2), ("Q2_K", 16.1, 4.8))]
    for chart in charts([*measured, *find("chinese-mixtral").rows], []):
        placed = boxes(chart, width, height, 12.0)
        assert len(placed) >= 8
        for a, b in itertools.combinations(placed, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert all(a[0] >= 0 and a[2] <= width and a[1] >= 0 and a[3] <= height for a in placed)


def test_a_label_without_room_is_left_out() -> None:
    crowd = [(50.0, 50.0)] * 60
    found = place_labels(crowd, [(40.0, 12.0)] * 60, (100.0, 100.0))
    assert None in found
    assert found[0] is not None and not found[0].leader


def test_a_gib_scale_for_gib_files() -> None:
    assert named(charts(find("chinese-mixtral").rows, []))["ppl-published"].x.title == "File size, GiB"
    assert find("chinese-mixtral").rows[0].bytes == 87 * GIB
