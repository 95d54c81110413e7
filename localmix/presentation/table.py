"""Tables as data: columns and rows of text, drawn on a terminal by `cli.console`, as Markdown and CSV here.

The quantization table (type, size, bits per weight, perplexity, divergence, speed, memory) is the main one:
`QuantizationRow` is what `ppl` measures, `quantization_table` how it is shown.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.inert import inert
from localmix.sizes import size_column

if TYPE_CHECKING:
    from localmix.measurement.divergence import Divergence


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand at the right, words at the left.

    A narrow terminal shows the columns of rank 0, and of the others, in the order of their rank, those that fit.
    """

    title: str
    number: bool = True
    rank: int = 0


@dataclass(frozen=True)
class Bars:
    """A column of bars, one for each row: shares of the column's width from 0 to 1, None for no bar."""

    title: str
    shares: tuple[float | None, ...]
    rank: int = 0


@dataclass(frozen=True)
class Table:
    """Columns, rows of the same length, and a line that says what was measured and how.

    Attributes:
        bars: an additional column that only a terminal shows.
        records: the rows as data, with every digit, for CSV; without them CSV has the cells.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    bars: Bars | None = None
    records: tuple[Mapping[str, str | float | None], ...] = ()

    def csv(self) -> str:
        """The table as CSV (RFC 4180): numbers in full and without units, nothing where nothing was measured."""
        text = io.StringIO()
        writer = csv.writer(text)
        lines: list[Iterable[str | float | None]] = [[column.title for column in self.columns], *self.rows]
        if self.records:
            lines = [self.records[0], *(record.values() for record in self.records)]
        # names come from files, and CSV goes to a terminal too
        writer.writerows([inert(cell) if isinstance(cell, str) else cell for cell in line] for line in lines)
        return text.getvalue()

    def markdown(self) -> str:
        """The table in GitHub's Markdown, aligned so that the source reads well too."""
        cells = [tuple(column.title for column in self.columns), *self.rows]
        cells = [tuple(cell.replace("|", r"\|") for cell in row) for row in cells]
        widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(self.columns))]

        def line(row: Sequence[str]) -> str:
            placed = (
                cell.rjust(width) if column.number else cell.ljust(width)
                for cell, width, column in zip(row, widths, self.columns, strict=True)
            )
            return "| " + " | ".join(placed) + " |"

        rule = "|" + "|".join(
            "-" * (width + 1) + (":" if column.number else "-")
            for width, column in zip(widths, self.columns, strict=True)
        )
        lines = [line(cells[0]), rule + "|", *(line(row) for row in cells[1:])]
        if self.caption:
            lines += ["", self.caption]
        return "\n".join(lines)


@dataclass(frozen=True)
class QuantizationRow:
    """One model of the quantization table. What was not measured is None.

    Attributes:
        path: the file; None for a published row.
        bytes: size of the file.
        bpw: bits per weight.
        ppl: perplexity, with its standard `error`, over `tokens` scored tokens in `chunks` chunks of `context`.
        prompt_ms_per_token: milliseconds for each token of a prompt.
        ms_per_token: milliseconds for each generated token.
        failure: why there are no numbers.
        delta_ppl: perplexity less the reference's, with `delta_error` of the paired differences.
        divergence: from the reference.
        pp_tps: tokens of a prompt per second.
        tg_tps: generated tokens per second.
        memory_bytes: at peak.
        origin: "measured", or "published" for figures that others measured.
        is_reference: `delta_ppl` and `divergence` of the other rows are against this one.
        corpus: the text; rows of different texts do not compare.
        device_ms_per_token: milliseconds for each generated token by the device of a published row.
    """

    model: str
    type: str
    path: Path | None
    bytes: int
    bpw: float | None
    ppl: float | None = None
    error: float | None = None
    tokens: int = 0
    chunks: int = 0
    prompt_ms_per_token: float | None = None
    ms_per_token: float | None = None
    failure: str = ""
    delta_ppl: float | None = None
    delta_error: float | None = None
    divergence: Divergence | None = None
    pp_tps: float | None = None
    tg_tps: float | None = None
    memory_bytes: int | None = None
    origin: str = "measured"
    is_reference: bool = False
    corpus: str = ""
    context: int = 0
    device_ms_per_token: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """No perplexity, or one that is no number, though it was measured."""
        if self.failure:
            return True
        if self.ppl is None:
            return self.origin == "measured"
        return not math.isfinite(self.ppl)

    @property
    def title(self) -> str:
        """The model's name; a published row says so."""
        return f"{self.model} (published)" if self.origin == "published" else self.model


@dataclass(frozen=True)
class ContextPoint:
    """The perplexity of a model at one context.

    Attributes:
        paired: the same target tokens are scored at every context of the curve.
        ppl: perplexity, with its standard `error` where that is known.
        tokens: how many were scored, in `chunks` chunks; 0 where that is not known.
        corpus, origin: as `QuantizationRow`.
    """

    model: str
    type: str
    context: int
    paired: bool
    ppl: float
    error: float | None
    tokens: int = 0
    chunks: int = 0
    corpus: str = ""
    origin: str = "measured"


@dataclass(frozen=True)
class Quantity:
    """A column of numbers of the quantization table.

    Attributes:
        name: in CSV.
        title: on the screen.
        value: the number of a row in the column's unit; None where it was not measured.
        digits: after the point.
        rank: as `Column.rank`.
        sign: plus signs are shown too.
    """

    name: str
    title: str
    value: Callable[[QuantizationRow], float | None]
    digits: int
    rank: int
    sign: bool = False

    def text(self, row: QuantizationRow) -> str:
        """The cell of a row."""
        value = self.value(row)
        return ("+" if self.sign and value is not None and value >= 0 else "") + number(value, self.digits)


def _of_divergence(name: str, scale: float = 1) -> Callable[[QuantizationRow], float | None]:
    def value(row: QuantizationRow) -> float | None:
        return None if row.divergence is None else getattr(row.divergence, name) * scale

    return value


QUANTITIES = (
    Quantity("bpw", "BPW", lambda row: row.bpw, 2, 4),
    Quantity("ppl", "PPL", lambda row: row.ppl, 4, 0),
    Quantity("ppl_error", "±", lambda row: row.error, 4, 0),
    Quantity("delta_ppl", "ΔPPL", lambda row: row.delta_ppl, 4, 5, sign=True),
    Quantity("delta_ppl_error", "±", lambda row: row.delta_error, 4, 5),
    Quantity("kld", "KLD", _of_divergence("mean"), 6, 1),
    Quantity("kld_error", "±", _of_divergence("error"), 6, 1),
    Quantity("kld_median", "KLD median", _of_divergence("median"), 6, 12),
    Quantity("kld_99", "KLD 99 %", _of_divergence("percentile_99"), 4, 9),
    Quantity("kld_max", "KLD max", _of_divergence("maximum"), 4, 13),
    Quantity("same_top_percent", "Same top %", _of_divergence("same_top", 100), 2, 6),
    Quantity("same_top_percent_error", "±", _of_divergence("same_top_error", 100), 2, 6),
    Quantity("prompt_ms_per_token", "Prompt ms/token", lambda row: row.prompt_ms_per_token, 2, 8),
    Quantity("prompt_tokens_per_second", "Prompt tokens/s", lambda row: row.pp_tps, 1, 11),
    Quantity("ms_per_token", "ms/token", lambda row: row.ms_per_token, 2, 3),
    Quantity("tokens_per_second", "tokens/s", lambda row: row.tg_tps, 1, 10),
)


def comparable(row: QuantizationRow) -> tuple[str, str]:
    """What rows must share for their perplexities to compare: the text and, when published, who measured."""
    return row.corpus, row.model if row.origin == "published" else ""


def quantization_table(rows: Sequence[QuantizationRow], caption: str = "") -> Table:
    """The rows with a column for all that was measured in one of them; model and corpus only when there are several."""
    unit, size_text = size_column([row.bytes for row in rows])
    quantities = [quantity for quantity in QUANTITIES if any(quantity.value(row) is not None for row in rows)]
    peaks = [row.memory_bytes for row in rows if row.memory_bytes is not None]
    peak_unit, peak_text = size_column(peaks)
    devices = list(dict.fromkeys(device for row in rows for device in row.device_ms_per_token))

    columns: list[Column] = []
    texts: list[Callable[[QuantizationRow], str]] = []

    def add(column: Column, text: Callable[[QuantizationRow], str]) -> None:
        columns.append(column)
        texts.append(text)

    if len({row.title for row in rows}) > 1 or any(row.origin == "published" for row in rows):
        add(Column("Model", number=False), lambda row: row.title)
    if len({row.corpus for row in rows}) > 1:
        # published rows say that they are; among measured ones only the name tells texts apart
        rank = 0 if len({row.corpus for row in rows if row.origin == "measured"}) > 1 else 6
        add(Column("Corpus", number=False, rank=rank), lambda row: row.corpus)
    add(Column("Type", number=False), lambda row: row.type)
    add(Column(f"Size {unit}".strip()), lambda row: size_text(row.bytes))
    for quantity in quantities:
        add(Column(quantity.title, rank=quantity.rank), lambda row, quantity=quantity: _cell(quantity, row))  # type: ignore[misc]
    if peaks:
        add(
            Column(f"Memory {peak_unit}".strip(), rank=7),
            lambda row: "–" if row.memory_bytes is None else peak_text(row.memory_bytes),
        )
    for device in devices:
        add(
            Column(f"{device} ms/token", rank=14),
            lambda row, device=device: number(row.device_ms_per_token.get(device), 1),  # type: ignore[misc]
        )
    cells = tuple(tuple(text(row) for text in texts) for row in rows)
    return Table(tuple(columns), cells, caption, _bars(rows), tuple(_record(row, devices) for row in rows))


def _cell(quantity: Quantity, row: QuantizationRow) -> str:
    if row.failed and quantity.name != "bpw":
        return "failed" if quantity.name == "ppl" else "–"
    return quantity.text(row)


def _record(row: QuantizationRow, devices: Sequence[str]) -> dict[str, str | float | None]:
    """The row for CSV: the same columns whatever was measured, so that a reader finds them by name."""
    return {
        "model": row.model,
        "type": row.type,
        "origin": row.origin,
        "corpus": row.corpus,
        "context": row.context or None,
        "chunks": row.chunks or None,
        "tokens": row.tokens or None,
        "bytes": row.bytes,
        **{quantity.name: _finite(quantity.value(row)) for quantity in QUANTITIES},
        "memory_bytes": row.memory_bytes,
        **{f"ms_per_token {device}": row.device_ms_per_token.get(device) for device in devices},
        "failure": row.failure,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _bars(rows: Sequence[QuantizationRow]) -> Bars | None:
    """What the differences look like: the divergence on a log scale where there is one, else ln(PPL / best PPL).

    A divergence spans decades, so its bars begin a little below the smallest; a perplexity's begin at the best.
    """
    means = [None if row.failed or row.divergence is None else row.divergence.mean for row in rows]
    logs = [math.log10(mean) if mean is not None and mean > 1e-9 else None for mean in means]
    found = [value for value in logs if value is not None]
    if len(found) > 1 and max(found) > min(found):
        low = min(found) - 0.1 * (max(found) - min(found))
        shares = tuple(None if value is None else (value - low) / (max(found) - low) for value in logs)
        return Bars("KLD, log", shares, rank=2)
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if not row.failed and row.ppl:
            best[comparable(row)] = min(row.ppl, best.get(comparable(row), math.inf))
    losses = [math.log(row.ppl / best[comparable(row)]) if not row.failed and row.ppl else None for row in rows]
    worst = max((loss for loss in losses if loss is not None), default=0.0)
    if not worst:
        return None
    return Bars("PPL loss", tuple(None if loss is None else loss / worst for loss in losses), rank=2)


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point, or with an exponent; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e7 else f"{value:.3e}"
