"""Speed of types: that it measures, keeps and measures again; every machine has its own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localmix.errors import UsageError
from localmix.measurement.type_speed import _largest_cache, measure, seconds_per_weight
from localmix.tensor_types import TensorType


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    kinds = [TensorType.F32, TensorType.Q8_0]
    first = measure(kinds, 1, progress=lambda *step: steps.append(step), folder=tmp_path)
    assert list(first.seconds) == kinds
    assert not first.kept
    # four bytes against one
    assert first.seconds[TensorType.F32] > first.seconds[TensorType.Q8_0] > 0
    assert first.processor and first.threads == 1
    assert 0 <= first.others <= 1
    assert [step[0] for step in steps] == list(range(len(steps)))
    assert all(done < total for done, total, _ in steps)
    assert steps[-1][1] == len(steps)
    kept = measure([TensorType.Q8_0], 1, folder=tmp_path)
    assert kept.kept
    assert kept.seconds == {TensorType.Q8_0: first.seconds[TensorType.Q8_0]}
    again = measure([TensorType.Q8_0], 1, again=True, folder=tmp_path)
    assert not again.kept
    # the other one's figure stays
    assert measure(kinds, 1, folder=tmp_path).seconds == {**first.seconds, **again.seconds}


def test_a_broken_file_is_measured_anew(tmp_path: Path) -> None:
    first = measure([TensorType.Q8_0], 1, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_bytes())
    nonsense = {**whole, "seconds_per_weight": {"Q8_0": float("nan")}}
    for broken in ("[]", json.dumps({**whole, "threads": 9}), json.dumps(nonsense)):
        path.write_text(broken)
        assert not measure([TensorType.Q8_0], 1, folder=tmp_path).kept, broken
    assert json.loads(path.read_bytes())["processor"] == first.processor


def test_figures_that_do_not_settle_are_not_kept(tmp_path: Path) -> None:
    hasty = measure([TensorType.Q4_0], 1, folder=tmp_path, patience=0)
    assert hasty.busy and hasty.seconds[TensorType.Q4_0] > 0
    assert list(tmp_path.iterdir()) == []


def test_figures_that_cannot_be_kept_are_still_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = measure([TensorType.Q4_0], 1, folder=tmp_path / "file" / "speeds")
    assert found.seconds[TensorType.Q4_0] > 0


def test_types_without_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="Q8_K is no type of weights"):
        seconds_per_weight([TensorType.Q4_0, TensorType.Q8_K])


def test_the_largest_cache_is_read_where_the_system_tells(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "1024K", "98304K", "what")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert _largest_cache(tmp_path) == 96 << 20
    assert _largest_cache(tmp_path / "none") == 0
