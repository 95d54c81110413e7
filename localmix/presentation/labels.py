"""Where the labels of a chart have room: beside their marks, none on another.

Text is measured by estimate, wide enough for any usual font: a page does not know the fonts of its reader.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from localmix.presentation.charts import LIMIT_TITLE, Chart

MARK_RADIUS = 5.0

Box = tuple[float, float, float, float]
Segment = tuple[float, float, float, float]

# directions from a mark, the ones that read best first
_DIRECTIONS = ((1, -0.6), (1, 0.6), (-1, -0.6), (-1, 0.6), (0, -1), (0, 1), (1, 0), (-1, 0))
_DISTANCES = (4.0, 9.0, 16.0, 26.0, 38.0)


@dataclass(frozen=True)
class Placed:
    """The centre of a label, and whether it is so far from its mark that a line must lead to it."""

    x: float
    y: float
    leader: bool


def place_labels(
    marks: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: tuple[float, float],
    lines: Sequence[Segment] = (),
    reserved: Sequence[Box] = (),
    radius: float = MARK_RADIUS,
) -> list[Placed | None]:
    """Put a label near each mark so that none touches another or a mark, and few are crossed by a line.

    Args:
        marks: centres, in pixels from the frame's upper left corner; earlier ones choose first.
        sizes: width and height of each label.
        frame: width and height that the labels stay in.
        lines: segments (x0, y0, x1, y1) that are better not covered.
        reserved: boxes (left, top, right, bottom) that are taken already.
        radius: of a mark.

    Returns:
        for each mark where its label goes; None where there is no room.
    """
    gap = radius / 2
    taken = [*reserved, *((x - radius, y - radius, x + radius, y + radius) for x, y in marks)]
    obstacles = [point for line in lines for point in _samples(line)]
    placed: list[Placed | None] = []
    for (x, y), (width, height) in zip(marks, sizes, strict=True):
        best: tuple[float, Box, Placed] | None = None
        for rank, (distance, direction) in enumerate((d, v) for d in _DISTANCES for v in _DIRECTIONS):
            reach = radius + distance
            centre_x = x + direction[0] * (reach + width / 2) if direction[0] else x
            centre_y = y + direction[1] * (reach + height / 2)
            box = (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
            if box[0] < 0 or box[1] < 0 or box[2] > frame[0] or box[3] > frame[1]:
                continue
            if any(_overlap(box, other) for other in taken):
                continue
            crossed = sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in obstacles)
            cost = rank + 3.0 * crossed
            if best is None or cost < best[0]:
                best = cost, box, Placed(centre_x, centre_y, distance > _DISTANCES[1])
        if best is None:
            placed.append(None)
        else:
            left, top, right, bottom = best[1]
            taken.append((left - gap, top, right + gap, bottom))
            placed.append(best[2])
    return placed


def _samples(line: Segment) -> list[tuple[float, float]]:
    """Points along a segment, a few pixels apart."""
    x0, y0, x1, y1 = line
    count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / 4))
    return [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def text_width(text: str, font_size: float) -> float:
    """A width that holds the text in any usual sans-serif font; Chinese characters are as wide as they are high."""
    return sum(1.05 if ord(character) >= 0x2E80 else 0.68 for character in text) * font_size


@dataclass(frozen=True)
class ChartLabels:
    """Where the words in a chart's frame go.

    Attributes:
        marks: by series and mark; None for a label without room.
        limit: the centre of the 16 GiB line's label.
    """

    marks: tuple[tuple[Placed | None, ...], ...]
    limit: tuple[float, float] | None


def chart_labels(chart: Chart, width: float, height: float, font_size: float) -> ChartLabels:
    """Place a chart's labels in a frame of so many pixels; marks on the Pareto front choose first."""

    def pixel(x: float, y: float) -> tuple[float, float]:
        return chart.x.place(x) * width, (1 - chart.y.place(y)) * height

    lines: list[Segment] = []
    for front in chart.fronts:
        ends = [pixel(*point) for point in front]
        lines += [(*start, *end) for start, end in itertools.pairwise(ends)]
    for part in chart.series:
        for mark in part.marks:
            if mark.error:
                lines.append((*pixel(mark.x, mark.y - mark.error), *pixel(mark.x, mark.y + mark.error)))
    order = [(s, m) for s, part in enumerate(chart.series) for m in range(len(part.marks))]
    order.sort(key=lambda key: not chart.series[key[0]].marks[key[1]].on_front)
    marks = [chart.series[s].marks[m] for s, m in order]
    centres = [pixel(mark.x, mark.y) for mark in marks]
    reserved: list[Box] = []
    if chart.limit is not None:
        at = chart.x.place(chart.limit) * width
        lines.append((at, 0, at, height))
        reserved.append(_limit_box(at, centres, (width, height), font_size))
    places: dict[tuple[int, int], Placed | None] = {}
    if chart.labelled:
        sizes = [(text_width(mark.label, font_size), font_size * 1.25) for mark in marks]
        found = place_labels(centres, sizes, (width, height), lines, reserved)
        places = dict(zip(order, found, strict=True))
    return ChartLabels(
        tuple(tuple(places.get((s, m)) for m in range(len(part.marks))) for s, part in enumerate(chart.series)),
        next((((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in reserved), None),
    )


def _limit_box(at: float, marks: Sequence[tuple[float, float]], frame: tuple[float, float], font_size: float) -> Box:
    """A corner beside the line of 16 GiB, one without a mark if there is any."""
    wide, high = text_width(LIMIT_TITLE, font_size) + 4, font_size * 1.25
    corners = [(left, top) for top in (0.0, frame[1] - high - 4) for left in (at + 4, at - wide - 4)]
    boxes = [(left, top, left + wide, top + high) for left, top in corners if left >= 0 and left + wide <= frame[0]]

    def hidden(box: Box) -> int:
        reach = MARK_RADIUS
        return sum(box[0] - reach < x < box[2] + reach and box[1] - reach < y < box[3] + reach for x, y in marks)

    return min(boxes, key=hidden)
