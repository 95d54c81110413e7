"""Rows of the quantization table as text, Markdown and CSV, on terminals of all widths, and numbers for people."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import pytest

from localmix.cli.console import Console
from localmix.measurement.divergence import Divergence
from localmix.presentation.table import Bars, Column, QuantizationRow, Table, quantization_table

GIB = 2**30


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(kind: str, gib: float, ppl: float | None, **values: object) -> QuantizationRow:
    fields: dict[str, object] = {"model": "mixtral", "path": Path("x"), "bpw": 4.87, "error": 0.048}
    return QuantizationRow(type=kind, bytes=int(gib * GIB), ppl=ppl, **(fields | values))  # type: ignore[arg-type]


def diverging(mean: float) -> Divergence:
    return Divergence(
        mean=mean,
        error=mean / 20,
        median=mean / 3,
        percentile_99=mean * 9,
        maximum=mean * 40,
        same_top=0.91234,
        same_top_error=0.004,
    )


def full_rows() -> list[QuantizationRow]:
    """A reference and three types with everything measured."""
    reference = row("BF16", 87, 4.4, is_reference=True, ms_per_token=80.0, tg_tps=12.5, memory_bytes=90 * GIB)
    measured = [
        row(
            kind,
            gib,
            4.4 + loss,
            delta_ppl=loss,
            delta_error=loss / 10,
            divergence=diverging(loss / 2),
            prompt_ms_per_token=9.5,
            pp_tps=105.3,
            ms_per_token=31.2,
            tg_tps=32.04,
            memory_bytes=int(gib + 1) * GIB,
        )
        for kind, gib, loss in (("Q8_0", 46.2, 0.0004), ("Q4_K_M", 26.49, 0.05), ("IQ2_XXS", 11.7, 4.2))
    ]
    return [reference, *measured]


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


def test_a_failed_row_keeps_its_size_and_loses_its_numbers() -> None:
    table = quantization_table([row("Q8_0", 1, math.nan, ms_per_token=3.0), row("Q4_0", 1, 5.0, ms_per_token=2.0)])
    assert table.rows[0] == ("Q8_0", "1.00", "4.87", "failed", "–", "–")


def test_several_models_are_named() -> None:
    table = quantization_table([row("Q8_0", 1, 5.0), row("Q8_0", 1, 5.0, model="other")])
    assert [cells[0] for cells in table.rows] == ["mixtral", "other"]


def test_a_published_row_says_so_even_alone() -> None:
    (cells,) = quantization_table([row("Q8_0", 1, 5.0, origin="published", path=None)]).rows
    assert cells[:2] == ("mixtral (published)", "Q8_0")


def test_a_published_row_without_perplexity_did_not_fail() -> None:
    table = quantization_table([row("F16", 87, None, error=None, origin="published"), row("Q8_0", 46, 4.4)])
    assert table.rows[0][4] == "–"


def test_all_columns_of_a_full_row() -> None:
    table = quantization_table(full_rows())
    assert [column.title for column in table.columns] == [
        "Type", "Size GiB", "BPW", "PPL", "±", "ΔPPL", "±", "KLD", "±", "KLD median", "KLD 99 %", "KLD max",
        "Same top %", "±", "Prompt ms/token", "Prompt tokens/s", "ms/token", "tokens/s", "Memory GiB",
    ]  # fmt: skip
    cells = table.rows[2]
    assert cells == (
        "Q4_K_M", "26.49", "4.87", "4.4500", "0.0480", "+0.0500", "0.0050", "0.025000", "0.001250", "0.008333",
        "0.2250", "1.0000", "91.23", "0.40", "9.50", "105.3", "31.20", "32.0", "27.00",
    )  # fmt: skip
    assert table.rows[0][5:14] == ("–",) * 9  # the reference has no distance from itself


def test_corpora_are_named_when_there_are_several() -> None:
    table = quantization_table([row("Q8_0", 1, 5.0, corpus="a.txt"), row("Q8_0", 1, 5.0, corpus="b.txt")])
    assert [cells[0] for cells in table.rows] == ["a.txt", "b.txt"]


def test_csv_has_every_digit_and_the_same_columns_whatever_was_measured() -> None:
    rows = [*full_rows(), row("Q2_K", 1, math.nan, model='a "b", c', failure="NaN in\nchunk 3")]
    text = quantization_table(rows).csv()
    assert text.count("\r\n") == 6
    records = list(csv.DictReader(io.StringIO(text, newline="")))
    assert float(records[1]["kld"]) == 0.0002
    assert int(records[2]["bytes"]) == int(26.49 * GIB)
    assert float(records[2]["delta_ppl_error"]) == 0.005
    assert records[0]["kld"] == ""
    assert records[4]["model"] == 'a "b", c'
    assert records[4]["failure"] == "NaN in\nchunk 3"
    assert records[4]["ppl"] == ""
    alone = quantization_table([row("Q8_0", 1, 5.0)]).csv()
    assert alone.splitlines()[0] == text.splitlines()[0]


def test_csv_of_a_table_without_records_has_its_cells() -> None:
    assert Table((Column("A"), Column("B")), (("1,5", "x"),)).csv() == 'A,B\r\n"1,5",x\r\n'


def test_csv_is_harmless_on_a_terminal() -> None:
    text = quantization_table([row("Q8_0", 1, 5.0, model="\x1b[31mred\x07\udcff")]).csv()
    assert "\x1b" not in text and "\x07" not in text
    text.encode("utf-8")


def test_bars_of_the_divergence_are_logarithmic() -> None:
    bars = quantization_table(full_rows()).bars
    assert bars is not None and bars.title == "KLD, log"
    reference, small, middle, large = bars.shares
    assert reference is None
    assert large == 1
    assert small == pytest.approx(0.1 / 1.1)
    assert middle is not None and 0.4 < middle < 0.7


def test_bars_of_the_perplexity_begin_at_the_best_of_each_text() -> None:
    rows = [
        row("Q8_0", 1, 5.0),
        row("Q4_0", 1, 5.5),
        row("Q2_K", 1, 7.0),
        row("Q8_0", 1, 4.0, origin="published"),
        row("Q4_0", 1, None),
    ]
    bars = quantization_table(rows).bars
    assert bars is not None
    assert bars.shares[0] == bars.shares[3] == 0
    assert bars.shares[1] == pytest.approx(math.log(1.1) / math.log(1.4))
    assert bars.shares[2] == 1
    assert bars.shares[4] is None


def test_equal_rows_need_no_bars() -> None:
    assert quantization_table([row("Q8_0", 1, 5.0)]).bars is None


def on_screen(monkeypatch: pytest.MonkeyPatch, table: Table, width: int) -> list[str]:
    """The lines of a table on a terminal so wide."""
    screen = Screen()
    for name, value in (("TERM", "xterm"), ("COLUMNS", str(width))):
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", screen)
        Console().table(table)
    return re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()).splitlines()


def test_eighty_columns_show_what_matters_and_name_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_screen(monkeypatch, quantization_table(full_rows(), "caption"), 80)
    assert lines[0].split() == ["Type", "Size", "GiB", "BPW", "PPL", "±", "KLD", "±", "KLD,", "log"]
    assert all(len(line) <= 80 for line in lines[:6])
    assert "█" * 10 in lines[5]
    assert lines[6].startswith("Not in a window this narrow: ")
    note = " ".join(line.strip() for line in lines[6:-1])
    left_out = {title.strip(" .") for title in note[29:].split(",")}
    shown = {"Type", "Size GiB", "BPW", "PPL", "KLD", "±"}
    assert left_out == {column.title for column in quantization_table(full_rows()).columns} - shown
    assert lines[-1] == "caption"


def test_a_wide_terminal_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_screen(monkeypatch, quantization_table(full_rows()), 260)
    assert len(lines) == 6
    assert "KLD max" in lines[0]


def test_the_text_of_published_rows_may_be_left_out_and_of_measured_ones_not(monkeypatch: pytest.MonkeyPatch) -> None:
    published = row("Q8_0", 46, 4.4, origin="published", corpus="an unpublished text")
    rows = [*full_rows(), published]
    assert "Corpus" not in on_screen(monkeypatch, quantization_table(rows), 80)[0]
    other = [dataclasses.replace(one, corpus="b.txt") for one in full_rows()]
    assert "Corpus" in on_screen(monkeypatch, quantization_table([*rows, *other]), 80)[0]


def test_the_narrowest_terminal_still_shows_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_screen(monkeypatch, quantization_table(full_rows()), 10)
    assert lines[4].split() == ["Q4_K_M", "26.49", "4.4500", "0.0480"]


def test_bars_are_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    table = quantization_table(full_rows())
    Console().table(table)
    Console().table(table, markdown=True)
    assert "█" not in capsys.readouterr().out + table.csv()


def test_bars_have_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Bars("Loss", (0.0, 1e-6, 0.45, 2.0, None))
    table = Table((Column("A"),), (("1",), ("2",), ("3",), ("4",), ("5",)), bars=bars)
    lines = on_screen(monkeypatch, table, 80)
    assert [line.split()[1:] for line in lines[2:]] == [[], ["▏"], ["████▌"], ["█" * 10], []]


def test_markdown_cells_cannot_break_the_table() -> None:
    table = Table((Column("A|B", number=False), Column("C")), (("x|y", "1"),))
    assert table.markdown().splitlines()[2] == r"| x\|y |   1 |"


def test_sizes_without_a_unit_in_common_name_theirs() -> None:
    table = quantization_table([row("Q8_0", 46.2, 4.4, origin="published"), row("Q8_0", 0.004, 1.8)])
    assert table.columns[2].title == "Size"
    assert [cells[2] for cells in table.rows] == ["46.20 GiB", "4.10 MiB"]


def test_the_perplexity_of_a_broken_model_does_not_fill_the_screen() -> None:
    assert quantization_table([row("Q1_0", 1, 1.5e300)]).rows[0][3] == "1.500e+300"
