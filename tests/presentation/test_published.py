"""The published tables: their figures, what is unknown about them, and arithmetic that they must obey."""

from __future__ import annotations

import pytest

from localmix.errors import UsageError
from localmix.presentation.published import find, load
from localmix.presentation.table import quantization_table
from localmix.presets import load_presets
from localmix.sizes import GIB

# of Mixtral-8x7B
PARAMETERS = 46_702_792_704


def test_there_are_two() -> None:
    assert list(load()) == ["chinese-mixtral", "chinese-llama-2"]


@pytest.mark.parametrize("name", load())
def test_all_of_it_is_labelled_as_published(name: str) -> None:
    table = find(name)
    assert table.rows
    assert {row.origin for row in table.rows} | {point.origin for point in table.points} == {"published"}
    assert all(row.path is None and not row.failed for row in table.rows)
    assert all("unpublished" in row.corpus for row in table.rows)
    assert all("unpublished" in point.corpus for point in table.points)
    assert any("was not published" in note for note in table.notes)
    drawn = quantization_table(table.rows)
    assert all(cells[0].endswith("(published)") for cells in drawn.rows)
    assert "failed" not in {cell for cells in drawn.rows for cell in cells}


@pytest.mark.parametrize("name", load())
def test_the_types_are_those_of_the_set_of_that_name(name: str) -> None:
    presets = load_presets()
    types = {presets.canonical(row.type) for row in find(name).rows}
    assert types - {"F16"} == set(presets.find_set(name)) - {"F16"}


def test_sizes_of_chinese_mixtral_follow_from_the_bits_per_weight() -> None:
    table = find("chinese-mixtral")
    computed = {row.type: (row.bpw or 0) * PARAMETERS / 8 / GIB for row in table.rows}
    for row in table.rows:
        assert row.bytes / GIB == pytest.approx(computed[row.type], abs=0.06)
    # what was printed for three of them contradicts their bits per weight
    (note,) = [note for note in table.notes if "printed" in note]
    assert "Q5_K, Q4_K and Q3_K (30.0, 24.6 and 19.0)" in note
    assert "30.9, 26.5 and 21.0 GiB" in note
    for kind, printed in (("Q5_K", 30.0), ("Q4_K", 24.6), ("Q3_K", 19.0)):
        assert abs(printed - computed[kind]) > 0.5


def test_figures_of_chinese_mixtral() -> None:
    rows = {row.type: row for row in find("chinese-mixtral").rows}
    assert len(rows) == 12
    assert rows["F16"].ppl is None and rows["F16"].device_ms_per_token == {}
    assert (rows["IQ2_XXS"].ppl, rows["IQ2_XXS"].error) == (8.5981, 0.093)
    assert rows["Q4_K"].device_ms_per_token == {"M3 Max": 31.2, "A100": 21.7}
    assert rows["IQ3_XXS"].device_ms_per_token == {"A100": 20.6}
    assert {row.context for row in rows.values()} == {4096}


def test_figures_of_chinese_llama_2() -> None:
    rows = {row.type: row for row in find("chinese-llama-2").rows}
    assert len(rows) == 11
    assert rows["Q4_K"].ppl == 9.240
    assert rows["Q5_0"].device_ms_per_token == {"M1 Max CPU": 48}
    assert {(row.error, row.bpw, row.context) for row in rows.values()} == {(None, None, 0)}


def test_curves_over_the_context() -> None:
    points = find("chinese-mixtral").points
    first = [(point.context, point.ppl) for point in points if point.corpus == "unpublished text 1"]
    assert first[0] == (512, 4.862) and first[-1] == (65536, 4.692) and len(first) == 9
    second = [(point.context, point.ppl) for point in points if point.corpus == "unpublished text 2"]
    assert second[-1] == (131072, 5.693) and len(second) == 6
    assert {(point.type, point.paired, point.error) for point in points} == {("Q4_0", False, None)}


def test_an_unknown_table_is_told_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="'mixtral'") as caught:
        find("mixtral")
    assert "chinese-mixtral, chinese-llama-2" in caught.value.hint
