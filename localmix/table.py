"""Tables as data: columns and rows of text, drawn on a terminal by `cli.console` and as Markdown here.

The quantization table (type, size, bits per weight, perplexity, speed) is the main one: `QuantizationRow`
is what `ppl` measures, `quantization_table` how it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
GIB = 2**30


def size(count: int) -> str:
    """Bytes for people, unit named: GiB, or MiB and KiB for what is too small for it to say anything."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1024:.1f} KiB"


def size_unit(counts: Iterable[int]) -> tuple[int, str]:
    """The one unit for a column of sizes: (bytes, name). GiB unless the largest is below a tenth of it."""
    return (GIB, "GiB") if max(counts, default=GIB) >= GIB / 10 else (MIB, "MiB")


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand at the right, words at the left."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, rows of the same length, and a line that says what was measured and how."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

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
    """One model of the quantization table.

    `bytes` is the file; `bpw` bits per weight; `ppl` ± `error` over `tokens` scored tokens in `chunks`
    chunks; `ms_per_token` is generation, `prompt_ms_per_token` prompt processing. What was not measured is
    None; `failure` says why, and then the row has no numbers.
    """

    model: str
    type: str
    path: Path
    bytes: int
    bpw: float | None
    ppl: float | None = None
    error: float | None = None
    tokens: int = 0
    chunks: int = 0
    prompt_ms_per_token: float | None = None
    ms_per_token: float | None = None
    failure: str = ""

    @property
    def failed(self) -> bool:
        """No perplexity, or one that is no number."""
        return bool(self.failure) or self.ppl is None or not math.isfinite(self.ppl)


def quantization_table(rows: Sequence[QuantizationRow], caption: str = "") -> Table:
    """Size, bits per weight, perplexity and speed of each model; the model's name only when there are several."""
    unit, unit_name = size_unit(row.bytes for row in rows)
    several = len({row.model for row in rows}) > 1
    timed = any(row.ms_per_token is not None for row in rows)
    columns = [Column("Model", number=False)] if several else []
    columns += [
        Column("Type", number=False),
        Column(f"Size {unit_name}"),
        Column("BPW"),
        Column("PPL"),
        Column("±"),
    ]
    columns += [Column("ms/token")] if timed else []
    cells = [
        (
            *([row.model] if several else []),
            row.type,
            f"{row.bytes / unit:.2f}",
            number(row.bpw, 2),
            "failed" if row.failed else number(row.ppl, 4),
            number(None if row.failed else row.error, 4),
            *([number(row.ms_per_token, 2)] if timed else []),
        )
        for row in rows
    ]
    return Table(tuple(columns), tuple(cells), caption)


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"
