"""A measurement as one HTML page that needs nothing else: provenance, the sortable table and the plots.

The page has a Content-Security-Policy that lets nothing load and runs only the script and the style with the
digests of its own. All text from models and corpora is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import localmix
from localmix.output import write_atomically
from localmix.presentation.charts import Chart, charts
from localmix.presentation.svg import COLOURS, draw, shape, text
from localmix.presentation.table import QUANTITIES, ContextPoint, Quantity, QuantizationRow, comparable, number
from localmix.sizes import size, size_column

DATA = Path(__file__).parent.parent / "data"

# view boxes of the two drawings of each chart: the style sheet shows the one that is readable
WIDE, NARROW = (640, 420), (340, 320)
# a value of the provenance that is longer gets a line of its own
LONG = 40
# "within one per cent of the best"
CLOSE = 1.01


@dataclass(frozen=True)
class Report:
    """What was measured, and how.

    Attributes:
        provenance: what a reader needs to measure it again, by name: corpus, sha256, tokens, chunks, context,
            engine, threads, machine.
        notes: sentences on what is unusual, or published and not measured.
    """

    title: str
    provenance: Mapping[str, str]
    rows: Sequence[QuantizationRow]
    points: Sequence[ContextPoint] = ()
    notes: Sequence[str] = ()


def write_html(path: Path, report: Report) -> None:
    """Write the page of a report.

    Raises:
        FileError, CapacityError: as `output.write_atomically`.
    """
    write_atomically(path, page(report).encode("utf-8"))


def page(report: Report) -> str:
    """The page of a report; the same report gives the same page."""
    style, script = ((DATA / name).read_text("utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)};"
        " base-uri 'none'; form-action 'none'"
    )
    lead = _lead(report.rows)
    return Template((DATA / "report.html").read_text("utf-8")).substitute(
        policy=policy,
        version=localmix.__version__,
        title=text(report.title),
        lead=f'<p class="lead">{lead}</p>' if lead else "",
        provenance=_provenance(report.provenance),
        table=_table(report.rows),
        charts=_charts(charts(report.rows, report.points)),
        contexts=_points_table(report.points),
        notes=_notes(report.notes),
        style=style,
        script=script,
    )


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _lead(rows: Sequence[QuantizationRow]) -> str:
    """One sentence that answers the question most readers come with: how small without a visible loss?"""
    measured = [row for row in rows if not row.failed and row.ppl is not None and row.origin == "measured"]
    if len(measured) < 3 or len({(row.title, *comparable(row)) for row in measured}) > 1:
        return ""
    best = min(row.ppl or math.inf for row in measured)
    close = min((row for row in measured if (row.ppl or math.inf) <= best * CLOSE), key=lambda row: row.bytes)
    largest = max(measured, key=lambda row: row.bytes)
    if close is largest:
        return ""
    return (
        f"The smallest file within 1 % of the best perplexity is <strong>{text(close.type)}</strong>:"
        f" {size(close.bytes)} instead of {size(largest.bytes)}, perplexity {number(close.ppl, 4)}"
        f" against {number(best, 4)}."
    )


def _provenance(fields: Mapping[str, str]) -> str:
    if not fields:
        return ""
    entries = []
    for name, value in fields.items():
        kind = ' class="long"' if len(value) > LONG else ""
        entries.append(f"<div{kind}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>")
    return f'<dl class="provenance">{"".join(entries)}</dl>'


@dataclass(frozen=True)
class _Head:
    """A column of the page's table: a quantity, and the one that is its error."""

    quantity: Quantity
    error: Quantity | None


def _heads(rows: Sequence[QuantizationRow]) -> list[_Head]:
    """The columns with a number in some row; an error stands in its value's cell."""
    heads: list[_Head] = []
    for quantity in QUANTITIES:
        if all(quantity.value(row) is None for row in rows):
            continue
        if quantity.title == "±":
            heads[-1] = _Head(heads[-1].quantity, quantity)
        else:
            heads.append(_Head(quantity, None))
    return heads


def _table(rows: Sequence[QuantizationRow]) -> str:
    """The quantization table as a section; nothing without rows."""
    if not rows:
        return ""
    unit, size_text = size_column([row.bytes for row in rows])
    peaks = [row.memory_bytes for row in rows if row.memory_bytes is not None]
    peak_unit, peak_text = size_column(peaks)
    devices = list(dict.fromkeys(device for row in rows for device in row.device_ms_per_token))
    with_model = len({row.title for row in rows}) > 1 or any(row.origin == "published" for row in rows)
    with_corpus = len({row.corpus for row in rows}) > 1
    heads = _heads(rows)

    titles = ["Type", *(["Model"] if with_model else []), *(["Corpus"] if with_corpus else [])]
    words = len(titles)
    titles += [
        "Size" + (f", {unit}" if unit else ""),
        *(head.quantity.title + (" ± error" if head.error else "") for head in heads),
        *(["Memory" + (f", {peak_unit}" if peak_unit else "")] if peaks else []),
        *(f"ms/token, {device}" for device in devices),
    ]
    body = []
    for row in rows:
        tags = [*(["reference"] if row.is_reference else []), *(["published"] if row.origin == "published" else [])]
        cells = [_name(row.type, tags)]
        cells += [_word(row.model)] if with_model else []
        cells += [_word(row.corpus)] if with_corpus else []
        cells.append(_cell(row.bytes, size_text(row.bytes)))
        cells += [_quantity_cell(head, row) for head in heads]
        if peaks:
            peak = row.memory_bytes
            cells.append(_cell(peak, "–" if peak is None else peak_text(peak)))
        for device in devices:
            value = row.device_ms_per_token.get(device)
            cells.append(_cell(value, number(value, 1)))
        body.append(cells)
    return _sortable("table", "Table", "One row for each model or type", titles, words, body)


def _points_table(points: Sequence[ContextPoint]) -> str:
    """The points of the curves over the context as a section; nothing without points."""
    if not points:
        return ""
    with_corpus = len({point.corpus for point in points}) > 1
    titles = ["Model", "Scored tokens", *(["Corpus"] if with_corpus else [])]
    words = len(titles)
    titles += ["Context", "PPL ± error", "Tokens", "Chunks"]
    body = []
    for point in points:
        error = "" if point.error is None else f' <span class="error">± {number(point.error, 4)}</span>'
        finite = point.ppl if math.isfinite(point.ppl) else None
        cells = [_name(f"{point.model} {point.type}", ["published"] if point.origin == "published" else [])]
        cells.append(_word("the same at each context" if point.paired else "each context's own"))
        cells += [_word(point.corpus)] if with_corpus else []
        cells += [
            _cell(point.context, f"{point.context:,}"),
            _cell(finite, number(finite, 4) + error),
            _cell(point.tokens or None, f"{point.tokens:,}"),
            _cell(point.chunks or None, f"{point.chunks:,}"),
        ]
        body.append(cells)
    return _sortable("contexts", "Contexts", "One row for each model and context", titles, words, body)


def _sortable(
    name: str, title: str, caption: str, titles: Sequence[str], words: int, body: Sequence[Sequence[str]]
) -> str:
    """A section with a table whose headings sort.

    Args:
        words: how many of the first columns hold words and not numbers.
    """
    heads = []
    for index, words_of in enumerate(titles):
        kind = ' class="word name"' if index == 0 else ' class="word"' if index < words else ""
        heads.append(f'<th scope="col"{kind}><button type="button">{text(words_of)}</button></th>')
    rows = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    return (
        f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-title"><table>'
        f"<caption>{caption}; a heading sorts by its column.</caption>\n"
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _name(words: str, tags: Sequence[str]) -> str:
    marks = "".join(f' <span class="tag">{tag}</span>' for tag in tags)
    return f'<th scope="row" class="word">{text(words)}{marks}</th>'


def _word(words: str) -> str:
    return f'<td class="word">{text(words)}</td>'


def _quantity_cell(head: _Head, row: QuantizationRow) -> str:
    value = head.quantity.value(row)
    if row.failed and head.quantity.name != "bpw":
        return (
            f'<td class="failed" title="{text(row.failure)}">failed</td>'
            if head.quantity.name == "ppl"
            else _cell(None)
        )
    words = head.quantity.text(row)
    if head.error is not None and head.error.value(row) is not None:
        words += f' <span class="error">± {head.error.text(row)}</span>'
    return _cell(value, words)


def _cell(value: float | None, words: str = "–") -> str:
    if value is None:
        return '<td class="none">–</td>'
    return f'<td data-v="{value!r}">{words}</td>'


def _charts(drawn: Sequence[Chart]) -> str:
    if not drawn:
        return ""
    figures = "\n".join(_figure(chart) for chart in drawn)
    return (
        '<section aria-labelledby="charts-title"><h2 id="charts-title">Plots</h2>'
        f'<div class="charts">{figures}</div></section>'
    )


def _figure(chart: Chart) -> str:
    legend = ""
    if len(chart.series) > 1:
        entries = []
        for index, series in enumerate(chart.series):
            classes = f"c{index % COLOURS}" + (" published" if series.published else "")
            glyph = f'<svg viewBox="0 0 16 16" aria-hidden="true">{shape(index, 8, 8)}</svg>'
            entries.append(f'<li class="{classes}">{glyph}<span>{text(series.title)}</span></li>')
        legend = f'<ul class="legend">{"".join(entries)}</ul>'
    return (
        f'<figure id="{chart.name}"><h3>{text(chart.title)}</h3><p class="axis">{text(chart.y.title)}</p>{legend}'
        f"{draw(chart, *WIDE, 'wide')}{draw(chart, *NARROW, 'narrow')}"
        f"<figcaption>{text(chart.caption)}</figcaption></figure>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        '<section class="notes" aria-labelledby="notes-title"><h2 id="notes-title">Notes</h2>'
        f"<ul>{items}</ul></section>"
    )
