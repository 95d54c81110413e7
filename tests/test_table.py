"""Rows of the quantization table as text and Markdown, and numbers for people."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from localmix.table import Column, QuantizationRow, Table, quantization_table, size, size_unit

GIB = 2**30


def row(kind: str, gib: float, ppl: float | None, **values: object) -> QuantizationRow:
    fields: dict[str, object] = {"model": "mixtral", "path": Path("x"), "bpw": 4.87, "error": 0.048}
    return QuantizationRow(type=kind, bytes=int(gib * GIB), ppl=ppl, **(fields | values))  # type: ignore[arg-type]


def test_the_published_row() -> None:
    table = quantization_table([row("Q4_K_M", 26.49, 4.4488, ms_per_token=31.2)], "as published")
    assert table.markdown() == (
        "| Type   | Size GiB |  BPW |    PPL |      ± | ms/token |\n"
        "|--------|---------:|-----:|-------:|-------:|---------:|\n"
        "| Q4_K_M |    26.49 | 4.87 | 4.4488 | 0.0480 |    31.20 |\n"
        "\nas published"
    )


def test_what_was_not_measured_has_no_number() -> None:
    table = quantization_table(
        [row("Q8_0", 1, math.nan), row("Q4_0", 1, None, failure="broken"), row("F16", 2, 5.0, bpw=None)]
    )
    assert [column.title for column in table.columns][-1] == "±"
    assert [cells[3:] for cells in table.rows] == [("failed", "–"), ("failed", "–"), ("5.0000", "0.0480")]
    assert table.rows[2][2] == "–"


def test_several_models_are_named() -> None:
    table = quantization_table([row("Q8_0", 1, 5.0), row("Q8_0", 1, 5.0, model="other")])
    assert [cells[0] for cells in table.rows] == ["mixtral", "other"]


def test_markdown_cells_cannot_break_the_table() -> None:
    table = Table((Column("A|B", number=False), Column("C")), (("x|y", "1"),))
    assert table.markdown().splitlines()[2] == r"| x\|y |   1 |"


@pytest.mark.parametrize(
    ("count", "words"), [(26 * GIB, "26.00 GiB"), (GIB // 4, "0.25 GiB"), (2**23, "8.00 MiB"), (2048, "2.0 KiB")]
)
def test_sizes_name_their_unit(count: int, words: str) -> None:
    assert size(count) == words


def test_a_column_has_one_unit() -> None:
    assert size_unit([GIB, 100]) == (GIB, "GiB")
    assert size_unit([2**20, 100]) == (2**20, "MiB")
    assert size_unit([]) == (GIB, "GiB")
