"""Perplexity over the context: windows that score the same targets, and the points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localmix.errors import InputError, UsageError
from localmix.measurement.context_curve import curve_table, measure_contexts, windows
from localmix.measurement.corpus import read_corpus
from localmix.measurement.perplexity import Conditions, measure
from tests.random_model import write_random_model
from tests.texts import write_text


@pytest.mark.parametrize("size", [64, 65, 100, 512])
@pytest.mark.parametrize("ctx", [8, 9, 15, 31, 33, 60, 64])
def test_windows_score_every_target_of_the_second_half_once(size: int, ctx: int) -> None:
    chunks = np.arange(2 * size, dtype=np.int32).reshape(2, size)
    found, seen = windows(chunks, ctx, None)
    targets = []
    for window, skipped in zip(found, seen, strict=True):
        assert (np.diff(window) == 1).all() and window[0] // size == window[-1] // size
        targets.extend(window[ctx // 2 + 1 + skipped :].tolist())
    assert targets == [token for chunk in chunks for token in chunk[size // 2 + 1 :].tolist()]
    assert (windows(chunks, ctx, 7)[0][:, 0] == 7).all()


def test_the_longest_window_is_the_chunk() -> None:
    chunks = np.arange(60, dtype=np.int32).reshape(2, 30)
    found, seen = windows(chunks, 30, None)
    assert (found == chunks).all() and (seen == 0).all()
    with pytest.raises(UsageError, match="2 tokens"):
        windows(chunks, 2, None)


def test_points(tmp_path: Path) -> None:
    """A dense model, so that no expert is chosen otherwise in another batch."""
    model = write_random_model(tmp_path / "dense.gguf", experts=0)
    corpus = read_corpus([write_text(tmp_path / "text.txt", 3000)])
    conditions = Conditions(chunks=3, threads=1)
    steps: list[tuple[int, int, str]] = []
    alone = list(
        measure_contexts(
            model,
            corpus,
            [256, 64, 128],
            conditions,
            name="dense",
            kind="F32",
            progress=lambda *step: steps.append(step),
        )
    )
    assert [(point.context, point.chunks, point.tokens) for point in alone] == [
        (64, 3, 93),
        (128, 3, 189),
        (256, 3, 381),
    ]
    for point in alone:
        found = measure(model, corpus, point.context, 3, threads=1)
        assert (point.ppl, point.error) == (found.ppl, found.error)
        assert (point.model, point.type, point.corpus, point.paired) == ("dense", "F32", "text.txt", False)
    assert (3, 3, "chunks of 64") in steps and (3, 3, "chunks of 256") in steps

    paired = list(measure_contexts(model, corpus, [64, 256], conditions, paired=True))
    assert [point.tokens for point in paired] == [381, 381]
    assert [point.chunks for point in paired] == [3 * 5, 3]
    assert paired[1].ppl == pytest.approx(alone[2].ppl, rel=1e-6)
    assert paired[0].ppl != pytest.approx(alone[0].ppl, rel=1e-3)


def test_memory_does_not_grow_with_context_times_vocabulary(tmp_path: Path) -> None:
    """The logits of the scored half alone would take 500 MB."""
    wide = write_random_model(
        tmp_path / "wide.gguf", layers=1, hidden=64, feed_forward=64, experts=0, context=8192, embedding_rows=32000
    )
    found = measure(wide, write_text(tmp_path / "text.txt", 40_000), 8192, 1, threads=1)
    assert found.tokens == 4095
    assert found.memory_bytes is not None and found.memory_bytes < 400 << 20


def test_the_table_has_names_where_they_differ(tmp_path: Path, random_model: Path) -> None:
    corpus = read_corpus([write_text(tmp_path / "text.txt", 1500)])
    points = list(measure_contexts(random_model, corpus, [64, 128], Conditions(chunks=2, threads=1), kind="F32"))
    table = curve_table(points, "A caption.")
    assert [column.title for column in table.columns] == ["Context", "PPL", "±", "Tokens", "Chunks"]
    assert table.rows[0][0] == "64" and table.rows[1][3:] == ("126", "2")
    assert "paired,context" in table.csv()
    with pytest.raises(InputError, match="too short"):
        list(measure_contexts(random_model, corpus, [64, 4096], Conditions(threads=1)))
