"""Charts as inline SVG, coloured by the page's style sheet; the same chart gives the same text."""

from __future__ import annotations

from html import escape

from localmix.inert import inert
from localmix.presentation.charts import LIMIT_TITLE, Chart, Mark
from localmix.presentation.labels import MARK_RADIUS, Placed, chart_labels, text_width

FONT_SIZE = 12.0
TOP, RIGHT, BOTTOM = 14.0, 14.0, 44.0
# so many colours and shapes the style sheet and `shape` have; series beyond them begin again
COLOURS, SHAPES = 6, 4


def draw(chart: Chart, width: int, height: int, kind: str) -> str:
    """A chart as an `<svg>` of the class `kind`.

    Each mark is a group that can have the focus, with its details for assistive technology, and in `data-lines`
    for the page's script.

    Args:
        width, height: of the view box, in pixels of a text of `FONT_SIZE`.
    """
    left = max(text_width(text, FONT_SIZE) for _, text in chart.y.ticks) + 14
    inner_width, inner_height = width - left - RIGHT, height - TOP - BOTTOM

    def px(value: float) -> float:
        return left + chart.x.place(value) * inner_width

    def py(value: float) -> float:
        return TOP + (1 - chart.y.place(value)) * inner_height

    classes = f"chart {kind} fronted" if chart.fronts else f"chart {kind}"
    parts = [
        f'<svg class="{classes}" viewBox="0 0 {width} {height}" role="group" aria-label="{text(chart.title)}">',
        '<g class="grid" aria-hidden="true">',
    ]
    for value, label in chart.y.ticks:
        parts.append(line(left, py(value), width - RIGHT, py(value)))
        parts.append(label_at(left - 8, py(value) + 4, label, "end"))
    free = -1e9  # where the last label of the x axis ended
    for value, label in chart.x.ticks:
        half = text_width(label, FONT_SIZE) / 2
        parts.append(line(px(value), TOP + inner_height, px(value), TOP + inner_height + 5))
        if px(value) - half > free + 4 and px(value) + half <= width:
            parts.append(label_at(px(value), TOP + inner_height + 19, label, "middle"))
            free = px(value) + half
    parts.append(line(left, TOP + inner_height, width - RIGHT, TOP + inner_height, "base"))
    parts.append(label_at(left + inner_width / 2, height - 6, chart.x.title, "middle"))
    parts.append("</g>")
    places = chart_labels(chart, inner_width, inner_height, FONT_SIZE)
    if chart.limit is not None and places.limit is not None:
        at = px(chart.limit)
        parts.append(f'<g class="limit" aria-hidden="true">{line(at, TOP, at, TOP + inner_height)}')
        x, y = places.limit
        parts.append(label_at(left + x, TOP + y + FONT_SIZE * 0.35, LIMIT_TITLE, "middle") + "</g>")
    for front in chart.fronts:
        path = " ".join(f"{number(px(x))},{number(py(y))}" for x, y in front)
        parts.append(f'<polyline class="front" points="{path}" aria-hidden="true"/>')
    labels: list[str] = []
    for index, series in enumerate(chart.series):
        # beside one another labels of two series need the colour of theirs
        colour = f"c{index % COLOURS}" if len(chart.series) > 1 else ""
        classes = f"series c{index % COLOURS}" + (" published" if series.published else "")
        parts.append(f'<g class="{classes}" role="group" aria-label="{text(series.title)}">')
        aside = chart.aside(index)
        if series.joined:
            path = " ".join(f"{number(px(mark.x) + aside)},{number(py(mark.y))}" for mark in series.marks)
            parts.append(f'<polyline class="curve" points="{path}" aria-hidden="true"/>')
        for mark, place in zip(series.marks, places.marks[index], strict=True):
            ends = tuple(map(py, chart.y.error_bar(mark)))
            parts.append(_mark(mark, px(mark.x) + aside, py(mark.y), ends, index))
            if place is not None:
                labels.append(_label(mark, place, left, px(mark.x), py(mark.y), colour))
        parts.append("</g>")
    parts += ['<g class="labels" aria-hidden="true">', *labels, "</g>", "</svg>"]
    return "".join(parts)


def _mark(mark: Mark, x: float, y: float, bar: tuple[float, ...], index: int) -> str:
    title = "; ".join(mark.details)
    lines = "\n".join(mark.details)
    front = " on-front" if mark.on_front else ""
    parts = [f'<g class="mark{front}" tabindex="-1" role="img" aria-label="{text(title)}" data-lines="{text(lines)}">']
    if bar:
        parts += [line(x, bar[0], x, bar[1], "error")]
        parts += [line(x - 3, end, x + 3, end, "error") for end in bar]
    parts.append(f'<circle class="target" cx="{number(x)}" cy="{number(y)}" r="14"/>')
    parts.append(shape(index, x, y))
    parts.append("</g>")
    return "".join(parts)


def _label(mark: Mark, place: Placed, left: float, x: float, y: float, colour: str) -> str:
    centre_x, centre_y = left + place.x, TOP + place.y
    parts = ""
    if place.leader:
        half = text_width(mark.label, FONT_SIZE) / 2
        end_x = min(max(x, centre_x - half), centre_x + half)
        end_y = min(max(y, centre_y - FONT_SIZE * 0.6), centre_y + FONT_SIZE * 0.6)
        parts = line(x, y, end_x, end_y, "leader")
    return parts + label_at(centre_x, centre_y + FONT_SIZE * 0.35, mark.label, "middle", colour)


def shape(index: int, x: float, y: float, radius: float = MARK_RADIUS) -> str:
    """The mark of a series: circle, square, diamond or triangle, of about the same area."""
    kind = index % SHAPES
    if kind == 0:
        return f'<circle class="shape" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'
    corners = {
        1: [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        2: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        3: [(0, -1.3), (1.2, 0.85), (-1.2, 0.85)],
    }[kind]
    path = " ".join(f"{number(x + dx * radius)},{number(y + dy * radius)}" for dx, dy in corners)
    return f'<polygon class="shape" points="{path}"/>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str = "") -> str:
    """A `<line>`."""
    name = f' class="{kind}"' if kind else ""
    return f'<line{name} x1="{number(x0)}" y1="{number(y0)}" x2="{number(x1)}" y2="{number(y1)}"/>'


def label_at(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """A `<text>`."""
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{text(words)}</text>'


def text(words: str) -> str:
    """Words as HTML: escaped, and without characters that reorder or hide what is read."""
    return escape(inert(words), quote=True)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
