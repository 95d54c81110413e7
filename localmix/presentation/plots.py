"""The plots of a report as one PNG or SVG file, drawn with matplotlib, which the extra `localmix[report]` brings."""

from __future__ import annotations

import importlib.util
import io
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmix.errors import InputError, UsageError
from localmix.inert import inert
from localmix.output import write_atomically
from localmix.presentation.charts import LIMIT_TITLE, Chart, charts
from localmix.presentation.labels import chart_labels
from localmix.presentation.report import Report

if TYPE_CHECKING:
    import matplotlib.axes

SUFFIXES = (".png", ".svg")
# colour-blind safe (Okabe and Ito), darkened where white paper wants it, with the shapes of the page
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0578c", "#a67800", "#5a5f6b")
SHAPES = ("o", "s", "D", "^")
INK, SOFT, RULE = "#1d1f24", "#5b5f69", "#e3e0da"

# in points, of which there are 72 to the inch; DPI is for PNG
_PANEL_WIDTH, _PANEL_HEIGHT = 500.0, 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 18.0, 34.0, 46.0
_HEAD = 44.0
_LEGEND_LINE = 15.0
_FONT, _SMALL = 9.0, 8.0
_DPI = 160
_FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei"]


def check(path: Path) -> None:
    """Refuse before anything is measured: an unknown suffix, or no matplotlib.

    Raises:
        UsageError: as said.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"A plot is a PNG or an SVG file, and {path} is neither.", "Name it .png or .svg.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("Plots need matplotlib, which is not installed.", "Install it: pip install 'localmix[report]'")


def write_plot(path: Path, report: Report) -> None:
    """Draw the panels for which a report has data into one file.

    Args:
        path: with the suffix .png or .svg.

    Raises:
        UsageError: as `check`.
        InputError: there is nothing to draw.
        FileError, CapacityError: as `output.write_atomically`.
    """
    check(path)
    panels = charts(report.rows, report.points)
    if not panels:
        raise InputError(
            "There is nothing to plot: a plot needs two models or two contexts with finite figures.",
            "Name more types with --types, or several contexts.",
        )
    write_atomically(path, _drawn(panels, report, path.suffix.lower()[1:]))


def _drawn(panels: list[Chart], report: Report, form: str) -> bytes:
    import matplotlib
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    legend = max(len(panel.series) if len(panel.series) > 1 else 0 for panel in panels) * _LEGEND_LINE
    height = _PANEL_HEIGHT + legend
    full_width = columns * _PANEL_WIDTH
    told = " · ".join(f"{name}: {value}" for name, value in report.provenance.items())
    # a character of the font is a little over half as wide as high
    small = textwrap.wrap(inert(told), round((full_width - _LEFT - _RIGHT) / (_SMALL * 0.6)))
    head = _HEAD + _SMALL * 1.5 * len(small)
    full_height = head + lines * height
    settings: Any = {
        "font.family": _installed(_FONTS),
        "font.size": _FONT,
        # the same report gives the same file; text stays text
        "svg.hashsalt": "localmix",
        "svg.fonttype": "none",
        "text.usetex": False,
        # a dollar sign in a model's name is no formula
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # without a Chinese font there are boxes in the place of Chinese names; nothing better can be done here
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = matplotlib.figure.Figure(figsize=(full_width / 72, full_height / 72), dpi=_DPI, facecolor="white")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        left = _LEFT / full_width
        figure.text(left, 1 - 34 / full_height, inert(report.title), fontsize=14, fontweight="bold", color=INK)
        figure.text(
            left, 1 - 44 / full_height, "\n".join(small), fontsize=_SMALL, color=SOFT, va="top", linespacing=1.4
        )
        for index, panel in enumerate(panels):
            column, line = index % columns, index // columns
            top = full_height - head - line * height - _TOP - legend
            bottom = full_height - head - (line + 1) * height + _BOTTOM
            frame = (_PANEL_WIDTH - _LEFT - _RIGHT, top - bottom)
            place = (column * _PANEL_WIDTH + _LEFT) / full_width, bottom / full_height
            axes = figure.add_axes((*place, frame[0] / full_width, frame[1] / full_height))
            _panel(axes, panel, frame, legend)
        metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": "localmix"}
        stream = io.BytesIO()
        figure.savefig(stream, format=form, metadata=metadata)
    return stream.getvalue()


def _installed(names: list[str]) -> list[str]:
    """Those of the fonts that there are: matplotlib warns about each that there is not."""
    import matplotlib.font_manager

    known = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    return [name for name in names if name in known]


def _panel(axes: matplotlib.axes.Axes, chart: Chart, frame: tuple[float, float], legend: float) -> None:
    """One chart, in a frame of so many points."""
    width, height = frame
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([chart.x.place(value) * width for value, _ in chart.x.ticks], [label for _, label in chart.x.ticks])
    axes.set_yticks(
        [(1 - chart.y.place(value)) * height for value, _ in chart.y.ticks], [label for _, label in chart.y.ticks]
    )
    axes.set_xlabel(chart.x.title, color=SOFT)
    axes.set_ylabel(chart.y.title, color=SOFT)
    axes.tick_params(colors=SOFT, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.text(0, -legend - 16, chart.title, fontsize=11, fontweight="bold", color=INK)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return chart.x.place(x) * width, (1 - chart.y.place(y)) * height

    for front in chart.fronts:
        xs, ys = zip(*(pixel(*point) for point in front), strict=True)
        axes.plot(xs, ys, color=SOFT, linewidth=1, linestyle=(0, (5, 4)), zorder=2)
    labels = chart_labels(chart, width, height, _FONT)
    if chart.limit is not None and labels.limit is not None:
        at = chart.x.place(chart.limit) * width
        axes.plot((at, at), (0, height), color=INK, linewidth=1.2, linestyle=":", zorder=1)
        axes.text(*labels.limit, LIMIT_TITLE, ha="center", va="center", fontweight="bold", color=INK)
    for index, series in enumerate(chart.series):
        colour = COLOURS[index % len(COLOURS)]
        aside = chart.aside(index)
        points = [(x + aside, y) for x, y in (pixel(mark.x, mark.y) for mark in series.marks)]
        if series.joined:
            xs, ys = zip(*points, strict=True)
            style: Any = (0, (4, 3)) if series.published else "-"
            axes.plot(xs, ys, color=colour, linewidth=1.4, linestyle=style, zorder=2)
        for mark, (x, y), label in zip(series.marks, points, labels.marks[index], strict=True):
            ends = [pixel(mark.x, end)[1] for end in chart.y.error_bar(mark)]
            if ends:
                axes.plot((x, x), ends, color=colour, linewidth=1, marker="_", markersize=5, alpha=0.7, zorder=2)
            if label is not None:
                if label.leader:
                    axes.plot((x, label.x), (y, label.y), color=SOFT, linewidth=0.6, zorder=2)
                words_colour = INK if len(chart.series) == 1 else colour
                words = axes.text(
                    label.x, label.y, inert(mark.label), ha="center", va="center", color=words_colour, zorder=5
                )
                words.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8})
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=30,
            marker=SHAPES[index % len(SHAPES)],
            facecolor="white" if series.published else colour,
            edgecolor=colour if series.published else "white",
            linewidth=1.5 if series.published else 0.8,
            label=inert(series.title),
            zorder=4,
            clip_on=False,
        )
    if len(chart.series) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            frameon=False,
            labelcolor=INK,
            borderpad=0.2,
            handletextpad=0.3,
            labelspacing=0.25,
        )
